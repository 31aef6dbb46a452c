"""Labelled images of one domain in batches, for training a segmenter."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infra.errors import UserError
from pipelines.loader import DataConfig, Loader
from pipelines.shards import LABEL_SPACE


@dataclass
class LabelledBatch:
    """One micro-batch of labelled images.

    images: float32 (b, 3, h, w) in [-1, 1], RGB, channels-last. labels: uint8 (b, h, w) trainIds, 255 = ignore, cut and
    mirrored like the images. Both on the loader's device. keys: the samples' names. slots: int64 (b,), their places in
    the global batch, on the CPU.
    """

    images: Tensor
    labels: Tensor
    keys: list[str]
    slots: Tensor


class LabelledLoader(Loader[LabelledBatch]):
    """The labelled training images of a domain, "source" or "target"; see `Loader`.

    UserError if they have no labels, or labels of another space than the project's classes.
    """

    labels = True

    def __init__(self, root_url: str, config: DataConfig, *, domain: str, **options: Any) -> None:
        super().__init__(root_url, config, domains=(domain,), **options)
        (split,) = self.splits
        if split.label_space is None:
            raise UserError(
                f"the {domain} images of {root_url} have no labels: choose the other --domain, or prepare data that has"
            )
        if split.label_space != LABEL_SPACE:
            raise UserError(
                f"the labels of {root_url} are of the space {split.label_space!r}, not {LABEL_SPACE}: prepare it again"
            )

    def _batches(self, keys: list[str], decoded: list[Tensor]) -> list[LabelledBatch]:
        images, labels = decoded
        size = len(self._slots[0])
        images_of, labels_of = images.split(size), labels.split(size)
        return [
            LabelledBatch(images_of[m], labels_of[m], keys[m * size : (m + 1) * size], torch.tensor(slots))
            for m, slots in enumerate(self._slots)
        ]
