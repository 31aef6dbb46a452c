"""Weights of classes in a segmenter's loss, so that it also learns those with few pixels."""

import torch
from torch import Tensor, nn

LEAST = 1e-3  # share of the pixels: rarer classes weigh no more, or a handful of pixels would lead the training


def pixels_by_class(labels: Tensor, classes: int) -> Tensor:
    """(classes,) float64: how many pixels of integer labels are of each class; others, such as 255, are of none."""
    flat = labels.flatten().long().clamp(max=classes)
    counts = torch.zeros(classes + 1, dtype=torch.float64, device=labels.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype))[:classes]


class ClassWeights(nn.Module):
    """A pixel of class c weighs max(share of c, LEAST)^-power, by the shares of labelled pixels that were counted: all alike at
    power 0, every class as much as any other at 1 (down to LEAST).

    counts: (C,) float64, of pixels. Labels of C or more count and weigh nothing.
    """

    counts: Tensor

    def __init__(self, classes: int, power: float) -> None:
        super().__init__()
        self.power = power
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.float64))

    def table(self) -> Tensor:
        """(C,) float32."""
        shares = self.counts / self.counts.sum().clamp(min=1)
        return (shares.clamp(min=LEAST) ** -self.power).float()

    def of(self, labels: Tensor) -> Tensor:
        """The weight of each pixel of labels (b, h, w), of their shape, float32."""
        table = torch.cat([self.table(), self.counts.new_zeros(1, dtype=torch.float32)])
        return table[labels.long().clamp(max=len(self.counts))]
