"""The learning rate as a pure function of the epoch."""

import math

from infra.errors import UserError


def lr_factor(kind: str, epoch: int, n_epochs: float, n_epochs_decay: float, step_epochs: int = 50) -> float:
    """What the learning rate is multiplied by during an epoch, counted from 1 (the schedules of CycleGAN and CUT).

    linear: 1 for n_epochs, then evenly down; the last of the n_epochs_decay epochs still has 1 / (n_epochs_decay + 1).
    step: a tenth after every step_epochs. cosine: from 1 down to 0 over n_epochs and up again after.
    """
    match kind:
        case "linear":
            return 1 - max(0, epoch - n_epochs) / (n_epochs_decay + 1)
        case "step":
            return 0.1 ** ((epoch - 1) // step_epochs)
        case "cosine":
            return (1 + math.cos(math.pi * (epoch - 1) / n_epochs)) / 2
        case _:
            raise UserError(f"learning rate schedule {kind} does not exist: choose linear, step or cosine")
