"""SRUNIT: Jia et al. 2021, "Semantically Robust Unpaired Image Translation for Data with Unmatched Semantics Statistics".

CUT plus L_robust, and the constraints that the paper compares L_robust with.
"""

from dataclasses import dataclass, field

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


class Srunit(Cut):
    config: SrunitConfig

    def added_parts(self) -> list[Part]:
        robust = [Robustness(self.config.robust, self.contrast)] if self.config.robust.beta > 0 else []
        return [*robust, *self.config.constraint.parts(self.contrast, self.discriminator)]
