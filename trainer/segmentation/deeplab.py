"""A light-weight DeepLabV3 on MobileNetV3-Small: the kind of segmenter with which the SRUNIT paper measures.

Howard et al., "Searching for MobileNetV3", ICCV 2019: Table 2 has the backbone, Sec. 6.4 with Fig. 10 the head
(LR-ASPP). What that paper leaves open follows `mobilenetv3_small_cityscapes_trainfine` of the TensorFlow DeepLab model
zoo, the network of SRUNIT's Appendix B: the last stage has half of Table 2's channels, the head 128 filters, and the
depthwise features of the last block at stride 8 skip to the head.
"""

import math
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F


class Row(NamedTuple):
    """One inverted residual of Table 2: its kernel, its channels once expanded and once projected, whether it
    squeezes and excites, and its non-linearity."""

    kernel: int
    expanded: int
    channels: int
    squeeze: bool
    activation: type[nn.Module]


STEM_CHANNELS = 16
ROWS = (
    Row(3, 16, 16, True, nn.ReLU),
    Row(3, 72, 24, False, nn.ReLU),
    Row(3, 88, 24, False, nn.ReLU),
    Row(5, 96, 40, True, nn.Hardswish),
    Row(5, 240, 40, True, nn.Hardswish),
    Row(5, 240, 40, True, nn.Hardswish),
    Row(5, 120, 48, True, nn.Hardswish),
    Row(5, 144, 48, True, nn.Hardswish),
    Row(5, 144, 48, True, nn.Hardswish),
    Row(5, 288, 48, True, nn.Hardswish),
    Row(5, 288, 48, True, nn.Hardswish),
)
LAST_CHANNELS = 288  # of the 1x1 convolution that ends the backbone
HEAD_CHANNELS = 128
SKIP_ROW = 2
STRIDED_ROWS = (0, 1, 3, 8)

# Output stride -> the strides of the stem and of STRIDED_ROWS. At 16 the last stage is dilated in place of strided.
STRIDES = {32: (2, 2, 2, 2, 2), 16: (2, 2, 2, 2, 1), 8: (1, 1, 2, 2, 2), 4: (1, 1, 1, 2, 2)}


class SqueezeExcite(nn.Module):
    """x (N, C, h, w) scaled by one gate in [0, 1] per channel, which sees the whole image through C/4 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = rounded(channels / 4)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class InvertedResidual(nn.Module):
    """x (N, inputs, h, w) -> the block's output (N, channels, ceil(h/stride), …), and the expanded features after the
    depthwise convolution, of the same height and width."""

    def __init__(self, inputs: int, row: Row, width: float, stride: int, dilation: int) -> None:
        super().__init__()
        expanded, channels = rounded(row.expanded * width), rounded(row.channels * width)
        widens = expanded != inputs
        self.expand = nn.Sequential(_conv_norm(inputs, expanded), row.activation()) if widens else nn.Identity()
        depthwise = _conv_norm(expanded, expanded, row.kernel, stride, dilation, groups=expanded)
        self.depthwise = nn.Sequential(depthwise, row.activation())
        self.squeeze_excite = SqueezeExcite(expanded) if row.squeeze else nn.Identity()
        self.project = _conv_norm(expanded, channels)
        self.shortcut = stride == 1 and inputs == channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.depthwise(self.expand(x))
        y = self.project(self.squeeze_excite(features))
        return (x + y if self.shortcut else y), features


class DeepLab(nn.Module):
    """(N, 3, h, w) normalised RGB -> (N, classes, ceil(h/s), ceil(w/s)) logits, to be resized by the caller.

    output_stride: of the deepest features; the logits stand at the skip's stride s. 32 (s = 8): nothing is dilated.
    16 (s = 8): the paper's, the last stage dilated. 8 (s = 2) and 4 (s = 1) are for small images: the first two or
    three of the five strided layers take stride 1, so that at 8 an image of 128x64 is seen as one of 512x256 is at 32.
    (Dilating the late stages instead, as for large images, cost more per step there and learned less in the same time.)
    width: the channels as a multiple of the paper's, rounded to multiples of 8. stride: pixels per deepest feature.
    """

    def __init__(self, classes: int, width: float = 1.0, output_stride: int = 16) -> None:
        super().__init__()
        stem_stride, *row_strides = STRIDES[output_stride]
        self.stride = math.prod(STRIDES[output_stride])
        stride_of = dict(zip(STRIDED_ROWS, row_strides, strict=True))
        channels, dilation = rounded(STEM_CHANNELS * width), 1
        self.stem = nn.Sequential(_conv_norm(3, channels, 3, stem_stride), nn.Hardswish())
        self.blocks = nn.ModuleList()
        for number, row in enumerate(ROWS):
            self.blocks.append(InvertedResidual(channels, row, width, stride_of.get(number, 1), dilation))
            channels = rounded(row.channels * width)
            if output_stride == 16 and number == STRIDED_ROWS[-1]:
                dilation = 2  # layers after the omitted stride keep their field of view
        last, head = rounded(LAST_CHANNELS * width), rounded(HEAD_CHANNELS * width)
        self.last = nn.Sequential(_conv_norm(channels, last), nn.Hardswish())
        self.head = LiteRaspp(rounded(ROWS[SKIP_ROW].expanded * width), last, head, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skipped = x
        for number, block in enumerate(self.blocks):
            x, features = block(x)
            if number == SKIP_ROW:
                skipped = features
        return self.head(skipped, self.last(x))


class LiteRaspp(nn.Module):
    """LR-ASPP, Fig. 10: skipped (N, low, h, w), deep (N, high, …) -> logits (N, classes, h, w).

    The pooling is over the whole image, as the model zoo's is over its whole training crop.
    """

    def __init__(self, low: int, high: int, channels: int, classes: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_conv_norm(high, channels), nn.ReLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(high, channels, 1, bias=False), nn.Sigmoid())
        self.classify_deep = nn.Conv2d(channels, classes, 1)
        self.classify_skipped = nn.Conv2d(low, classes, 1)

    def forward(self, skipped: Tensor, deep: Tensor) -> Tensor:
        # Fig. 10 resizes and then classifies. The two commute, and this way round there is less to resize.
        logits = self.classify_deep(self.branch(deep) * self.gate(deep))
        return self.classify_skipped(skipped) + F.interpolate(logits, skipped.shape[-2:], mode="bilinear")


def rounded(channels: float) -> int:
    """The nearest multiple of 8, at least 8 and never below 90 % of `channels`: MobileNet's rule for scaled widths."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def _conv_norm(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))
