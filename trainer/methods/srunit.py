"""SRUNIT: Jia et al. 2021, "Semantically Robust Unpaired Image Translation for Data with Unmatched Semantics Statistics".

CUT plus L_robust, and the constraints that the paper compares L_robust with.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from infra.config import option
from infra.errors import UserError
from trainer.methods.cut import Cut, CutConfig
from trainer.methods.parts.constraints import ConstraintConfig
from trainer.methods.parts.part import Part
from trainer.methods.parts.robustness import RobustConfig, Robustness


@dataclass(frozen=True, kw_only=True)
class SrunitConfig(CutConfig):
    """The defaults are the paper's (Sec. 5.3 and Appendix F)."""

    buffer: int = option(50, "images kept to show D earlier translations; 0: none")
    normalisation: str = option("srunit", "epsilon of the heads' normalisation", choices=("cut", "srunit"))
    robust: RobustConfig = field(default_factory=RobustConfig)
    constraint: ConstraintConfig = field(default_factory=ConstraintConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        strangers = set(self.robust.taps) - set(self.taps)
        if strangers:
            raise UserError(f"robust tap {min(strangers)} has no projection head: choose taps among "
                            f"{', '.join(map(str, self.taps))}, or add it to method.taps")  # fmt: skip

    def build(self, *, seed: int, global_batch: int) -> "Srunit":
        return Srunit(self, seed=seed, global_batch=global_batch)


# What the published code does by default, on top of SRUNIT's options: SeanJia/SRUNIT at 76231f1.
RELEASED: dict[str, Any] = {
    "method.buffer": 0, "method.robust.beta": 1e-3, "method.robust.T": 1e-3, "method.robust.rule": "published",
    "method.robust.per_step": "one", "method.robust.rest": True,
}  # fmt: skip


class Srunit(Cut):
    config: SrunitConfig

    def __init__(self, config: SrunitConfig, *, seed: int, global_batch: int) -> None:
        super().__init__(config, seed=seed, global_batch=global_batch)
        if config.robust.rest:
            start = config.robust.start
            self.phases = tuple(
                replace(phase, start=start) if phase.optimiser == "generator" else phase for phase in self.phases
            )

    def notes(self) -> list[str]:
        robust = self.config.robust
        rests = f"G and its heads rest for the first {robust.start:g} of all epochs, in which D alone is trained"
        return [*super().notes(), *([rests] if robust.rest else [])]

    def added_parts(self) -> list[Part]:
        robust = [Robustness(self.config.robust, self.contrast)] if self.config.robust.beta > 0 else []
        return [*robust, *self.config.constraint.parts(self.contrast, self.discriminator)]
