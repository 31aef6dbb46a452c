"""What translations are evaluated with, and during training how often."""

from dataclasses import dataclass

from infra.config import option
from infra.errors import UserError

# For each metric whether more or less of it is better.
BETTER = {
    "mIoU": "more", "pxAcc": "more", "clsAcc": "more", "flip_rate": "less", "drift": "less", "Dist": "less", "FID": "less",
    "KID": "less",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every: float = option(0.0, "epochs between evaluations on test images during training; 0: none", resumable=True)
    images: int | None = option(None, "test images of each domain, evenly spread [all]", resumable=True)
    segmenter: str | None = option(
        None,
        "segmenter to evaluate with: a run of launch/train_segmenter.py, or FILE.yaml of another network",
        resumable=True,
    )
    inception: str | None = option(None, "weights of Inception V3, for FID and KID", resumable=True)
    best: str = option(
        "auto", "metric by which the best checkpoint is kept; auto: mIoU with a segmenter, else Dist, else FID",
        choices=("auto", *BETTER), resumable=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError(f"evaluation.every = {self.every} counts epochs: give 0 (never) or more, such as 0.5")
        if self.images is not None and self.images < 1:
            raise UserError(f"{self.images} test images leave nothing to evaluate: give 1 or more, or leave it out")


def value_of(metrics: dict[str, object], name: str) -> float | None:
    """The metric by which checkpoints are compared, so that less is better; None where it was not available."""
    value = metrics.get(name)
    if not isinstance(value, float):
        return None
    return value if BETTER[name] == "less" else -value
