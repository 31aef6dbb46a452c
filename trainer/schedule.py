"""Steps, epochs and the learning rate, all as pure functions of the step number."""

import math
from dataclasses import dataclass
from fractions import Fraction

from infra.errors import UserError
from trainer.optim import OptimConfig


@dataclass(frozen=True)
class Schedule:
    """How steps, epochs of the source and learning rates go together.

    Numbers of epochs are taken as the decimals that a person wrote (1.1 is 11/10), so no step moves by rounding.
    """

    optim: OptimConfig
    source_samples: int

    @property
    def steps(self) -> int:
        """Steps that cover all epochs."""
        return math.ceil(self._epochs * self.source_samples / self.optim.global_batch)

    def epoch(self, step: int) -> int:
        """The epoch, counted from 1, in which a step (counted from 0) begins."""
        return step * self.optim.global_batch // self.source_samples + 1

    def passes(self, done: int, epochs: float) -> bool:
        """Whether the last of `done` steps reached a multiple of so many epochs."""
        interval = _exact(epochs) * self.source_samples
        before, now = ((steps * self.optim.global_batch) // interval for steps in (done - 1, done))
        return now > before

    def progress(self, step: int) -> float:
        """The share of all epochs that is done when a step (counted from 0) begins."""
        return float(step * self.optim.global_batch / (self._epochs * self.source_samples))

    def first_step_at(self, progress: float) -> int:
        """The first step (counted from 0) at whose beginning this share of all epochs is done."""
        return math.ceil(_exact(progress) * self._epochs * self.source_samples / self.optim.global_batch)

    def learning_rate(self, step: int) -> float:
        """The rate that a step (counted from 0) uses."""
        optim = self.optim
        return optim.lr * lr_factor(
            optim.schedule, self.epoch(step), optim.epochs, optim.decay_epochs, optim.step_epochs, optim.step_factor,
            progress=self.progress(step),
        )  # fmt: skip

    @property
    def _epochs(self) -> Fraction:
        return _exact(self.optim.epochs) + _exact(self.optim.decay_epochs)


def _exact(number: float) -> Fraction:
    return Fraction(repr(number))


def lr_factor(
    kind: str,
    epoch: int,
    n_epochs: float,
    n_epochs_decay: float,
    step_epochs: int = 50,
    step_factor: float = 0.1,
    *,
    progress: float = 0.0,
) -> float:
    """What the learning rate is multiplied by in an epoch, counted from 1, or when a share `progress` of all is done.

    By epochs, as CycleGAN's and CUT's published code. linear, where both numbers of epochs are whole: 1 for n_epochs,
    then evenly down; the last of the n_epochs_decay epochs still has 1 / (n_epochs_decay + 1). step: times
    step_factor after every step_epochs. cosine-published: from 1 down to 0 over n_epochs, and up again after.
    By progress, in [0, 1). linear, where a number of epochs is not whole: 1 for n_epochs, then down to 0 over
    n_epochs_decay. cosine: from 1 down to 0 over all epochs. poly: (1 - progress) ** 0.9 (Chen et al. 2017, DeepLabv3,
    Sec. 4.1).
    """
    match kind:
        case "linear":
            if float(n_epochs).is_integer() and float(n_epochs_decay).is_integer():
                return 1 - max(0, epoch - n_epochs) / (n_epochs_decay + 1)
            late = progress * (n_epochs + n_epochs_decay) - n_epochs
            return 1 - late / n_epochs_decay if late > 0 and n_epochs_decay > 0 else 1.0
        case "step":
            return step_factor ** ((epoch - 1) // step_epochs)
        case "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        case "cosine-published":
            return (1 + math.cos(math.pi * (epoch - 1) / n_epochs)) / 2
        case "poly":
            return (1 - progress) ** 0.9
        case _:
            raise UserError(f"learning rate schedule {kind} does not exist: choose one of linear, step, cosine, "
                            "cosine-published, poly")  # fmt: skip
