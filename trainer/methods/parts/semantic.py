"""What a segmenter that was trained on the sources alone, and does not learn any more, is good for: L_sem, by which it is to see
the source's classes in the translation; a mask, by which D sees only where source and target are of one class; and weights by
which D sees as much of each class in the targets as the sources have.
"""

from collections.abc import Sequence
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
from trainer.methods.parts.part import Outputs, Owner, Part
from trainer.networks import PatchDiscriminator
from trainer.segmentation.class_weights import pixels_by_class
from trainer.segmentation.jitter import jittered
from trainer.segmentation.trained import load_trained, weights_hash

MEASURED = 500  # pairs whose classes are counted before the first step


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
    sure: float = option(0.9, "with predicted labels: least probability of a class that counts")
    start: float = option(0.0, "share of all epochs before L_sem begins")
    jitter: float = option(
        0.0, "show the segmenter translations of a look that is changed at random, by so much (0 to 1, as --jitter of "
        "launch/train_segmenter.py): keeps G from patterns that fool it",
    )  # fmt: skip
    mask: bool = option(
        False, "show D source and target only where the segmenter sees the source's class in the target, too: the rest of "
        "the target then asks nothing of the translation",
    )  # fmt: skip
    balance: float = option(
        0.0, "weigh target patches in D's loss by how much more of their class the sources have, at most this often and at "
        "least one in so many; 0: all alike",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise UserError(f"method.semantic.weight = {self.weight} is negative: give 0 (without) or more, such as 1")
        if not 0 <= self.sure <= 1:
            raise UserError(f"method.semantic.sure = {self.sure} is a probability: give a number from 0 to 1")
        if not 0 <= self.start <= 1:
            raise UserError(f"method.semantic.start = {self.start} is a share of the epochs: give a number from 0 to 1")
        if not 0 <= self.jitter <= 1:
            raise UserError(
                f"method.semantic.jitter = {self.jitter} is a strength: give a number from 0 (none) to 1 (strong)"
            )
        if self.balance and self.balance <= 1:
            raise UserError(f"method.semantic.balance = {self.balance} is the largest weight: give 0 (without) or more than "
                            "1, such as 4")  # fmt: skip
        if self.used and self.segmenter is None:
            raise UserError("method.semantic needs a segmenter: give method.semantic.segmenter, a run of "
                            "launch/train_segmenter.py --domain source")  # fmt: skip

    @property
    def used(self) -> bool:
        return self.weight > 0 or self.balance > 0 or self.mask

    @property
    def reads_labels(self) -> bool:
        """Whether the sources' label maps are needed."""
        return (self.weight > 0 or self.mask) and self.labels == "true"

    def build(self, discriminator: PatchDiscriminator, global_batch: int) -> "SegmenterParts":
        """What is asked for. discriminator: whose loss is balanced. UserError if the segmenter cannot be had."""
        if not self.used:
            return SegmenterParts()
        assert self.segmenter is not None
        segmenter = FrozenSegmenter.load(Path(self.segmenter))
        return SegmenterParts(
            Semantics(self, segmenter) if self.weight else None,
            Mask(self, segmenter) if self.mask else None,
            Balance(self.balance, segmenter, discriminator.stride, global_batch) if self.balance else None,
        )


@dataclass(frozen=True)
class SegmenterParts:
    """What of a segmenter a method uses."""

    semantics: "Semantics | None" = None
    mask: "Mask | None" = None
    balance: "Balance | None" = None


class FrozenSegmenter(nn.Module):
    """A segmenter that gradients flow through to its images, and that nothing trains: batch norm uses its running
    statistics, whatever mode the method is in.

    network: (b, 3, h, w) in [-1, 1] to scores of so many classes, of any resolution. hash: of its weights as they were loaded.
    """

    def __init__(self, network: nn.Module, classes: int, hash: str) -> None:
        super().__init__()
        self.network, self.classes, self.hash = network.requires_grad_(False).eval(), classes, hash

    @classmethod
    def load(cls, path: Path) -> "FrozenSegmenter":
        """Of a segmenter's run or checkpoint. UserError if it is none."""
        segmenter: Any = load_trained(path)
        return cls(segmenter.logits, len(segmenter.trainids), weights_hash(segmenter.logits))

    def train(self, mode: bool = True) -> "FrozenSegmenter":
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (b, C, h, w) at the size of the images, float32 or wider: scores are resized, labels never are."""
        scores = self.network(images)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return F.interpolate(scores, images.shape[2:], mode="bilinear")


def held(segmenter: FrozenSegmenter) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """`fixed` and `given` of an owner that uses it."""
    return {"source_segmenter": segmenter}, {"method.semantic.segmenter": segmenter.hash}


class Semantics(Part):
    """L_sem."""

    name = "semantic"
    starts_at = "method.semantic.start"

    def __init__(self, config: SemanticConfig, segmenter: FrozenSegmenter) -> None:
        super().__init__(config.weight, config.start)
        self.config, self.segmenter = config, segmenter
        self.fixed, self.given = held(segmenter)

    def value(self, outputs: Outputs, batch: Batch, context: StepContext) -> Tensor:
        labels = source_classes(self.config, self.segmenter, outputs, batch)
        return semantic_loss(self.segmenter(self._shown(outputs.fake, batch, context)), labels)

    def _shown(self, fake: Tensor, batch: Batch, context: StepContext) -> Tensor:
        """What fools a segmenter in one look of an image seldom does in others (Athalye et al., ICML 2018: expectation over
        transformation)."""
        if not self.config.jitter:
            return fake
        fake = fake.to(torch.promote_types(fake.dtype, torch.float32))
        return jittered(fake, batch.slots, self.config.jitter, context.draws)


def source_classes(config: SemanticConfig, segmenter: FrozenSegmenter, outputs: Outputs, batch: Batch) -> Tensor:
    """uint8 (b, h, w), 255 = unknown, mirrored where the generator saw the source mirrored."""
    if config.labels == "predicted":
        with torch.no_grad():
            return sure_labels(segmenter(outputs.seen_source(batch)), config.sure)
    labels = batch.source_labels
    assert labels is not None, "the view asks for them"
    return labels.flip(2) if outputs.flipped else labels


class Mask(Owner):
    """Where a translation and a target image may be compared: where the source's class is the one that the segmenter sees in the
    target at the same place (Stuhr et al. 2023, "Masked Discriminators for Content-Consistent Unpaired Image-to-Image
    Translation"). D sees both through it, so it never sees more of a class in real images than translations are to have, and
    the mask's own shape tells it nothing. Targets of a like layout (`--data.match`) leave more to see.
    """

    def __init__(self, config: SemanticConfig, segmenter: FrozenSegmenter) -> None:
        super().__init__()
        self.config, self.segmenter = config, segmenter
        self.fixed, self.given = held(segmenter)

    @torch.no_grad()
    def of(self, outputs: Outputs, batch: Batch) -> Tensor:
        """(b, 1, h, w), of the targets' dtype: 1 where D sees, 0 where it does not. Nothing is seen where the source's class is
        unknown."""
        classes = source_classes(self.config, self.segmenter, outputs, batch)
        return (self.segmenter(outputs.seen_target(batch)).argmax(1) == classes)[:, None].to(batch.target.dtype)


class ClassCounts(nn.Module):
    """Pixels of each class in the sources and in the targets, (C,) float64."""

    source: Tensor
    target: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        for domain in ("source", "target"):
            self.register_buffer(domain, torch.zeros(classes, dtype=torch.float64))

    def ratios(self) -> Tensor:
        """(C,): the share of each class in the sources over that in the targets, inf where these have none; 1 where neither has
        any, or nothing was counted."""
        shares = [counts / counts.sum().clamp(min=1) for counts in (self.source, self.target)]
        return torch.where(shares[0] == shares[1], 1.0, shares[0] / shares[1])


class Balance(Owner):
    """Weights of target patches in D's loss: clip(p_source(class) / p_target(class), 1 / clip, clip), where the class is the
    segmenter's at the middle of the patch, and p its share of all pixels that the segmenter sees in crops of the domain. What
    the targets have more of than the sources then asks less of the translations.

    memory: the counts, of `MEASURED` pairs. stride: pixels from one patch to the next.
    """

    def __init__(self, clip: float, segmenter: FrozenSegmenter, stride: int, global_batch: int) -> None:
        super().__init__()
        self.clip, self.segmenter, self.stride = clip, segmenter, stride
        self.steps = -(-MEASURED // global_batch)
        self.counts = ClassCounts(segmenter.classes)
        self.memory = {"class_counts": self.counts}
        self.fixed, self.given = held(segmenter)

    def measured_steps(self) -> int:
        return self.steps

    def measure(self, batches: Sequence[Batch], context: StepContext) -> None:
        for batch in batches:
            for counts, images in ((self.counts.source, batch.source), (self.counts.target, batch.target)):
                found = pixels_by_class(self.segmenter(images).argmax(1), len(counts))
                counts += context.all_ranks(found[None])[0].sum(0)

    @torch.no_grad()
    def weights(self, images: Tensor, scores: Tensor) -> Tensor:
        """Of D's scores (b, 1, h', w') on target images (b, 3, h, w): of the scores' shape, float32 or wider."""
        classes = self.segmenter(images).argmax(1)
        rows, columns = (
            middles(patches, side, self.stride, images.device)
            for patches, side in zip(scores.shape[2:], images.shape[2:], strict=True)
        )
        table = self.counts.ratios().clamp(1 / self.clip, self.clip)
        dtype = torch.promote_types(scores.dtype, torch.float32)
        return table.to(dtype)[classes[:, rows[:, None], columns]][:, None]


def middles(patches: int, side: int, stride: int, device: torch.device) -> Tensor:
    """int64 (patches,): the pixels of a side in the middles of D's patches, which lie around the middle of the side."""
    places = (torch.arange(patches, device=device) - (patches - 1) / 2) * stride + (side - 1) / 2
    return places.round().long().clamp(0, side - 1)
