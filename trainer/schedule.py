"""The learning rate as a pure function of the time in the schedule."""

import math

from infra.errors import UserError

SCHEDULES = ("linear", "step", "cosine", "poly")


def lr_factor(
    kind: str, epoch: int, n_epochs: float, n_epochs_decay: float, step_epochs: int = 50, *, progress: float = 0.0
) -> float:
    """What the learning rate is multiplied by in an epoch, counted from 1, or when a share `progress` of all is done.

    By epochs, the schedules of CycleGAN and CUT. linear: 1 for n_epochs, then evenly down; the last of the n_epochs_decay
    epochs still has 1 / (n_epochs_decay + 1). step: a tenth after every step_epochs. cosine: from 1 down to 0 over
    n_epochs and up again after.
    By progress, in [0, 1). poly: (1 - progress) ** 0.9 (Chen et al. 2017, DeepLabv3, Sec. 4.1).
    """
    match kind:
        case "linear":
            return 1 - max(0, epoch - n_epochs) / (n_epochs_decay + 1)
        case "step":
            return 0.1 ** ((epoch - 1) // step_epochs)
        case "cosine":
            return (1 + math.cos(math.pi * (epoch - 1) / n_epochs)) / 2
        case "poly":
            return (1 - progress) ** 0.9
        case _:
            raise UserError(f"learning rate schedule {kind} does not exist: choose one of {', '.join(SCHEDULES)}")
