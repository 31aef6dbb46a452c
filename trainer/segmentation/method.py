"""Training a segmenter: pixel-wise cross entropy on labelled images, a method of one phase."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.methods.base import Losses, Method, OptimiserSpec, Phase, StepContext
from trainer.networks.sizes import Sizes
from trainer.segmentation.class_weights import ClassWeights, pixels_by_class
from trainer.segmentation.jitter import jittered
from trainer.segmentation.segmenter import IGNORE

MEASURED = 500  # images whose pixels are counted by class before the first step

# For each network the recipe of its training, by dotted name.
RECIPES: dict[str, dict[str, Any]] = {
    # What learned most in a minute on street scenes of 128x64 at output stride 8; beta1 as Adam's paper has it.
    "deeplab": {
        "optim.kind": "adam", "optim.lr": 2e-2, "optim.beta1": 0.9, "optim.global_batch": 8,
        "optim.schedule": "poly", "optim.epochs": 40.0, "optim.decay_epochs": 0.0,
    },
    # CUT, supplement, Sec. C.2: "the recommended setting" of DRN's authors "with batch size 32 and learning rate 0.01, for
    # 250 epochs". Theirs is SGD with this weight decay and a tenth of the rate every 100 epochs; momentum 0.9 is what
    # they use with the rate 0.01 (with 0.001 they use 0.99).
    "drn-d-22": {
        "optim.kind": "sgd", "optim.lr": 0.01, "optim.momentum": 0.9, "optim.weight_decay": 1e-4,
        "optim.global_batch": 32, "optim.schedule": "step", "optim.step_epochs": 100,
        "optim.epochs": 250.0, "optim.decay_epochs": 0.0,
    },
}  # fmt: skip


class LabelledBatch(Protocol):
    """One micro-batch: images (b, 3, h, w) in [-1, 1]; labels (b, h, w) trainIds, 255 = ignore; slots (b,) are their
    places in the global batch."""

    images: Tensor
    labels: Tensor
    slots: Tensor


class Segmentation(Method[LabelledBatch, Tensor]):
    """segmenter: (b, 3, h, w) in [-1, 1] to class scores (b, C, h', w') at any resolution, or to (m·b, C, h', w') of m networks
    that learn side by side; its `stride` is in pixels per deepest feature. jitter: strength of the random changes of colours in
    training images (`jittered`). weights: of the classes, in whose `counts` the first images are counted; none: all pixels
    alike. global_batch: images of a step."""

    phases = (Phase(name="segmenter", optimiser="segmenter", forward="segment", differentiates=True),)
    optimisers = (OptimiserSpec(name="segmenter", networks=("segmenter",)),)

    def __init__(
        self, segmenter: nn.Module, jitter: float = 0.0, weights: ClassWeights | None = None, global_batch: int = 1
    ) -> None:
        super().__init__()
        self.jitter, self.weights = jitter, weights
        self.steps = -(-MEASURED // global_batch) if weights else 0
        self.segmenter = segmenter
        self.product = nn.ModuleDict({"segmenter": segmenter})

    def memory(self) -> nn.ModuleDict:
        return nn.ModuleDict({"class_weights": self.weights} if self.weights else {})

    def measured_steps(self) -> int:
        return self.steps

    def measure(self, batches: Sequence[LabelledBatch], context: StepContext) -> None:
        assert self.weights is not None
        for batch in batches:
            found = pixels_by_class(batch.labels, len(self.weights.counts))
            self.weights.counts += context.all_ranks(found[None])[0].sum(0)

    def forward(self, batch: LabelledBatch, context: StepContext, name: str = "segment") -> Tensor:
        if not self.jitter:
            return self.segmenter(batch.images)
        with torch.no_grad():
            images = jittered(batch.images, batch.slots, self.jitter, context.draws)
        return self.segmenter(images)

    def sizes(self, images: int) -> Sizes:
        """Batch norm needs two features of a channel, so one image alone must leave more than one pixel of the deepest."""
        stride: Any = self.segmenter.stride
        return Sizes(smallest=stride + 1 if images == 1 else 1)

    def amount(self, batch: LabelledBatch) -> Tensor:
        """Its labelled pixels, each as much as its class weighs."""
        return self._amounts(batch.labels).sum()

    def loss(self, phase: str, outputs: Tensor, batch: LabelledBatch, context: StepContext) -> tuple[Tensor, Losses]:
        """Cross entropy averaged over the labelled pixels, at the labels' size: scores are resized, labels never are. 0
        where no pixel is labelled. Of several networks the sum, so that each learns as if alone; their means are reported.
        Reported: CE and pxAcc, the share of labelled pixels whose highest score is the true class's. With weights of classes
        every pixel counts as much as its class weighs, in both."""
        labels = batch.labels.long()
        members = len(outputs) // len(labels)
        labels = labels.repeat(members, 1, 1)
        scores_NCHW = F.interpolate(outputs.float(), labels.shape[1:], mode="bilinear")
        amounts = self._amounts(labels)
        count = amounts.sum()
        count = torch.where(count > 0, count, 1)  # a batch may have no labelled pixel
        weight = self.weights.table() if self.weights else None
        loss = F.cross_entropy(scores_NCHW, labels, weight, ignore_index=IGNORE, reduction="sum") / count
        right = ((scores_NCHW.argmax(1) == labels) * amounts).sum()
        return loss * members, {"CE": loss.detach(), "pxAcc": right / count}

    def _amounts(self, labels: Tensor) -> Tensor:
        """How much each pixel counts: (b, h, w), 0 where it has no label."""
        return self.weights.of(labels) if self.weights else labels != IGNORE
