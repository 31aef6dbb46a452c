"""The options of CUT, FastCUT and SRUNIT, and of what their papers compare them with."""

from dataclasses import dataclass, field

from infra.config import option
from infra.errors import UserError

# The padded input, the two down-sampling convolutions, the first and the fifth residual block (CUT, Appendix C.1).
PAPER_TAPS = (0, 4, 8, 12, 16)


@dataclass(frozen=True, kw_only=True)
class RobustConfig:
    """L_robust = 1/K sum_k L_k (SRUNIT, Eqn. 3)."""

    beta: float = option(
        1e-4, "weight of L_robust; 0: without it (the paper tunes it in [1e-5, 1e-3])", flag="--beta", adjustable=True
    )
    T: float = option(
        0.1, "largest norm of the perturbation tau (the paper tunes it in [0.01, 0.2])", flag="--T", adjustable=True
    )
    least: float = option(
        1e-7, "smallest norm of tau, which the distance is divided by (docs/flipping.md)", adjustable=True
    )
    taps: tuple[int, ...] = option((), "the K layers that are perturbed; none given: all of method.taps")
    per_step: str = option("all", "perturb all taps in each step, or one at random", choices=("all", "one"))
    rule: str = option(
        "paper", "norm of tau: drawn from [least, T], or always T as the published code has it",
        choices=("paper", "published"),
    )  # fmt: skip
    start: float = option(0.25, "share of all epochs before L_robust begins")
    gradient: str = option(
        "both", "networks that L_robust trains: G and its heads, or G alone", choices=("both", "generator")
    )
    semantics: str = option(
        "heads", "what is compared: features projected by the heads F_k, or as they are (E3)",
        choices=("heads", "features"),
    )  # fmt: skip
    reference: str = option(
        "source", "what the perturbed translation is compared with: the source (Eqn. 3), or its translation (Eqn. 4, E4)",
        choices=("source", "translation"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise UserError(f"beta = {self.beta} is negative: give 0 (no L_robust) or a positive weight such as 1e-4")
        if not 0 < self.least < self.T:
            raise UserError(f"norms of a perturbation from {self.least} to T = {self.T} are impossible: "
                            "give a least above 0 and below T, such as 1e-7 and 0.1")  # fmt: skip
        if not 0 <= self.start <= 1:
            raise UserError(f"method.robust.start = {self.start} is a share of the epochs: give a number from 0 to 1")
        if len(set(self.taps)) < len(self.taps):
            raise UserError(f"robust taps {', '.join(map(str, self.taps))} name one twice: name each tap once")


@dataclass(frozen=True, kw_only=True)
class ConstraintConfig:
    """Weights of the constraints that SRUNIT is compared with (its supplement, Appendix G); 0: without.

    The supplement gives no weights and no start: all begin where L_robust does by default.
    """

    self_distance: float = option(0.0, "weight of DistanceGAN's self-distance loss (E1)")
    smoothness: float = option(
        0.0, "weight of HarmonicGAN's smoothness loss on histograms of patches (E2)", adjustable=True
    )
    consistency: float = option(
        0.0, "weight of the distance between projected patches of source and translation (E5)", adjustable=True
    )
    lipschitz: float = option(0.0, "weight of the penalty on the gradient of D (E6)", adjustable=True)
    start: float = option(0.25, "share of all epochs before they begin, in which E1 measures its statistics")

    def __post_init__(self) -> None:
        if min(self.self_distance, self.smoothness, self.consistency, self.lipschitz) < 0:
            raise UserError("method.constraint.* are weights: give 0 (without) or positive numbers such as 1")
        if not 0 <= self.start <= 1:
            raise UserError(f"method.constraint.start = {self.start} is a share of the epochs: give one from 0 to 1")
        if self.self_distance > 0 and self.start == 0:
            raise UserError("method.constraint.self_distance measures both domains before method.constraint.start: "
                            "give a start above 0, such as 0.25")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """External negatives (CUT, Appendix C.1, after He et al. 2020, MoCo)."""

    size: int = option(0, "patches of earlier images kept as negatives, per layer; 0: none (CUT's comparison: 16384)")
    momentum: float = option(
        0.999, "share that the bank's encoder and heads keep of themselves in each step", adjustable=True
    )
    internal: bool = option(True, "negatives from the image itself too, not only from the bank")

    def __post_init__(self) -> None:
        if self.size < 0 or not 0 <= self.momentum <= 1:
            raise UserError(
                "method.bank.size counts patches (0 or more), and method.bank.momentum is a share from 0 to 1"
            )
        if not self.internal and not self.size:
            raise UserError("method.bank.internal false leaves no negatives: give method.bank.size, such as 16384")


@dataclass(frozen=True, kw_only=True)
class CutConfig:
    name: str = option("srunit", "preset of the options below", flag="--method", choices=("cut", "fastcut", "srunit"))
    gan: str = option("lsgan", "adversarial loss", choices=("lsgan", "vanilla", "nonsaturating"))
    lambda_gan: float = option(1.0, "weight of the adversarial loss of G", adjustable=True)
    lambda_nce: float = option(1.0, "weight of PatchNCE", adjustable=True)
    taps: tuple[int, ...] = option(PAPER_TAPS, "layers of G whose patches are contrasted")
    patches: int = option(256, "patches per image and layer", adjustable=True)
    temperature: float = option(0.07, "temperature of PatchNCE", adjustable=True)
    all_negatives: bool = option(False, "negatives from the whole global batch, not only from the same image")
    separate_encoder: bool = option(False, "an encoder and heads of their own for the translations, not those of G")
    decoder_nce: bool = option(True, "PatchNCE trains G's decoder too; false: its encoder and the heads alone")
    identity: bool = option(True, "PatchNCE on target images too, which G should leave as they are")
    flip_equivariance: bool = option(False, "mirror half of G's inputs, and the features of its output back")
    buffer: int = option(50, "images kept to show D earlier translations; 0: none")
    normalisation: str = option("srunit", "epsilon of the heads' normalisation", choices=("cut", "srunit"))
    bank: BankConfig = field(default_factory=BankConfig)
    robust: RobustConfig = field(default_factory=RobustConfig)
    constraint: ConstraintConfig = field(default_factory=ConstraintConfig)

    def __post_init__(self) -> None:
        if self.lambda_nce <= 0 or self.lambda_gan < 0:
            raise UserError("lambda_nce must be positive (PatchNCE trains the heads) and lambda_gan not negative")
        if self.temperature <= 0 or self.patches < 2:
            raise UserError("method.temperature must be positive, and method.patches 2 or more")
        if self.buffer < 0:
            raise UserError(f"method.buffer = {self.buffer} counts images: give 0 or more")
        if not self.taps:
            raise UserError("method.taps is empty: name layers of the generator such as 0,4,8,12,16")
        if self.all_negatives and self.separate_encoder:
            raise UserError("method.separate_encoder trains the keys, which method.all_negatives gathers from other ranks "
                            "without gradients: leave one of them out")  # fmt: skip
        if self.all_negatives and not self.bank.internal:
            raise UserError("method.all_negatives asks for negatives of the batch and method.bank.internal false for none "
                            "of them: leave one of them out")  # fmt: skip
        strangers = set(self.robust.taps) - set(self.taps)
        if strangers:
            raise UserError(f"robust tap {min(strangers)} has no projection head: choose taps among "
                            f"{', '.join(map(str, self.taps))}, or add it to method.taps")  # fmt: skip

    @property
    def robust_taps(self) -> tuple[int, ...]:
        return self.robust.taps or self.taps
