"""L_sem: a segmenter that was trained on the sources alone, and does not learn any more, is to see the source's classes in the
translation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infra.config import option
from infra.errors import UserError
from trainer.losses.semantics import semantic_loss, sure_labels
from trainer.methods.base import Batch, StepContext
from trainer.methods.parts.part import Outputs, Part
from trainer.segmentation.trained import load_trained, weights_hash


@dataclass(frozen=True, kw_only=True)
class SemanticConfig:
    """weight * CE(S(G(x)), y) with a frozen segmenter S (docs/segmenters.md)."""

    weight: float = option(
        0.0, "weight of L_sem, the cross entropy of a frozen segmenter on the translation; 0: without", adjustable=True
    )
    # Resumable: the same run may lie elsewhere. That it is the same, the hash of its weights tells.
    segmenter: str | None = option(
        None, "that segmenter: a run of launch/train_segmenter.py --domain source", resumable=True
    )
    labels: str = option(
        "true", "the source's label maps, or what the segmenter sees in the source where it is sure",
        choices=("true", "predicted"),
    )  # fmt: skip
    sure: float = option(0.9, "with predicted labels: least probability of a class that counts", adjustable=True)
    start: float = option(0.0, "share of all epochs before L_sem begins")

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise UserError(f"method.semantic.weight = {self.weight} is negative: give 0 (without) or more, such as 1")
        if not 0 <= self.sure <= 1:
            raise UserError(f"method.semantic.sure = {self.sure} is a probability: give a number from 0 to 1")
        if not 0 <= self.start <= 1:
            raise UserError(f"method.semantic.start = {self.start} is a share of the epochs: give a number from 0 to 1")
        if self.weight and self.segmenter is None:
            raise UserError("method.semantic needs a segmenter: give method.semantic.segmenter, a run of "
                            "launch/train_segmenter.py --domain source")  # fmt: skip

    @property
    def reads_labels(self) -> bool:
        """Whether the sources' label maps are needed."""
        return self.weight > 0 and self.labels == "true"

    def parts(self) -> list[Part]:
        """Those with a weight. UserError if the segmenter cannot be had."""
        if not self.weight:
            return []
        assert self.segmenter is not None
        return [Semantics(self, FrozenSegmenter.load(Path(self.segmenter)))]


class FrozenSegmenter(nn.Module):
    """A segmenter that gradients flow through to its images, and that nothing trains: batch norm uses its running
    statistics, whatever mode the method is in.

    network: (b, 3, h, w) in [-1, 1] to class scores of any resolution. hash: of its weights as they were loaded.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.hash = weights_hash(network)

    @classmethod
    def load(cls, path: Path) -> "FrozenSegmenter":
        """Of a segmenter's run or checkpoint. UserError if it is none."""
        network: Any = load_trained(path).logits
        return cls(network)

    def train(self, mode: bool = True) -> "FrozenSegmenter":
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (b, C, h, w) at the size of the images, float32 or wider: scores are resized, labels never are."""
        scores = self.network(images)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return F.interpolate(scores, images.shape[2:], mode="bilinear")


class Semantics(Part):
    """L_sem."""

    name = "semantic"
    starts_at = "method.semantic.start"

    def __init__(self, config: SemanticConfig, segmenter: FrozenSegmenter) -> None:
        super().__init__(config.weight, config.start)
        self.config, self.segmenter = config, segmenter
        self.fixed = {"source_segmenter": segmenter}
        self.given = {"method.semantic.segmenter": segmenter.hash}

    def value(self, outputs: Outputs, batch: Batch, context: StepContext) -> Tensor:
        return semantic_loss(self.segmenter(outputs.fake), self._labels(outputs, batch))

    def _labels(self, outputs: Outputs, batch: Batch) -> Tensor:
        """uint8 (b, h, w), mirrored where the generator saw the source mirrored."""
        if self.config.labels == "predicted":
            with torch.no_grad():
                return sure_labels(self.segmenter(outputs.seen_source(batch)), self.config.sure)
        labels = batch.source_labels
        assert labels is not None, "the view asks for them"
        return labels.flip(2) if outputs.flipped else labels
