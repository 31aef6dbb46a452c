"""ESPNetv2 at scale s = 2.0 with the decoder of its published segmentation weights.

Encoder: Mehta et al., "ESPNetv2: A Light-weight, Power Efficient, and General Purpose Convolutional Neural Network",
CVPR 2019, Sec. 3. Decoder: bottom-up from level 4 to level 1 with efficient pyramid pooling at each, as the authors
published it with the weights. Every module carries the name it has in that state dict, so that it loads by name.
"""

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infra.errors import UserError

CHANNELS = (32, 128, 256, 512)  # of levels 1 to 4 at s = 2.0
DECODER_CHANNELS = (64, 48, 32)
BRANCHES = 4  # K of the paper

# Dilation of each branch of an EESP unit. The paper bounds the receptive field level by level; a branch that would
# exceed the bound of level 4, 7x7, falls back to dilation 1, and branches stand in the order of their fields.
LEVEL_3_DILATIONS = (1, 2, 3, 4)
LEVEL_4_DILATIONS = (1, 1, 2, 3)

POOLING_SCALES = (2.0, 1.5, 1.0, 0.5, 0.1)
SMALLEST_POOLED = 5  # pixels each way


def load_espnetv2(path: Path) -> "ESPNetv2":
    """The network of a published state dict, in evaluation mode on the CPU; its number of classes is the file's.

    UserError if the file cannot be read, holds more than tensors, or belongs to another network.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network = ESPNetv2(len(state["bu_dec_l4.merge_layer.3.weight"]))
        network.load_state_dict(state)
    except Exception as error:  # a foreign file fails in as many ways as there are bytes in it
        raise UserError(
            f"{path} is damaged or not of an ESPNetv2 segmenter at scale 2.0: fetch the file again"
        ) from error
    return network.eval()


class ESPNetv2(nn.Module):
    """float (N, 3, h, w), RGB / 255 normalised with ImageNet's mean and deviation, to logits (N, classes, h, w).

    h and w are best multiples of 16 (any size works). classes: 20 in the Cityscapes weights, the 19 trainIds in order
    and background.
    """

    def __init__(self, classes: int = 20) -> None:
        super().__init__()
        projected = min(classes // 2, 16)
        self.base_net = Encoder()
        self.bu_dec_l1 = PyramidPool(CHANNELS[3], projected, DECODER_CHANNELS[0])
        self.bu_dec_l2 = PyramidPool(DECODER_CHANNELS[0], projected, DECODER_CHANNELS[1])
        self.bu_dec_l3 = PyramidPool(DECODER_CHANNELS[1], projected, DECODER_CHANNELS[2])
        self.bu_dec_l4 = PyramidPool(DECODER_CHANNELS[2], projected, classes, last=True)
        self.merge_enc_dec_l2 = Merge(CHANNELS[2], DECODER_CHANNELS[0])
        self.merge_enc_dec_l3 = Merge(CHANNELS[1], DECODER_CHANNELS[1])
        self.merge_enc_dec_l4 = Merge(CHANNELS[0], DECODER_CHANNELS[2])
        self.bu_br_l2 = nn.Sequential(*_norm_act(DECODER_CHANNELS[0]))
        self.bu_br_l3 = nn.Sequential(*_norm_act(DECODER_CHANNELS[1]))
        self.bu_br_l4 = nn.Sequential(*_norm_act(DECODER_CHANNELS[2]))

    def forward(self, x: Tensor) -> Tensor:
        level1, level2, level3, level4 = self.base_net(x)
        y = self.bu_dec_l1(level4)
        y = self.bu_dec_l2(self.bu_br_l2(self.merge_enc_dec_l2(level3) + _resize(y, level3)))
        y = self.bu_dec_l3(self.bu_br_l3(self.merge_enc_dec_l3(level2) + _resize(y, level2)))
        y = self.bu_dec_l4(self.bu_br_l4(self.merge_enc_dec_l4(level1) + _resize(y, level1)))
        return _resize(y, x)


class Encoder(nn.Module):
    """(N, 3, h, w) to the features of levels 1 to 4, at strides 2, 4, 8 and 16 (Sec. 3.3)."""

    def __init__(self) -> None:
        super().__init__()
        c1, c2, c3, c4 = CHANNELS
        self.level1 = _conv_norm_act(3, c1, 3, stride=2)
        self.level2_0 = StridedEESP(c1, c2)
        self.level3_0 = StridedEESP(c2, c3)
        self.level3 = nn.Sequential(*(EESP(c3, c3, LEVEL_3_DILATIONS) for _ in range(3)))
        self.level4_0 = StridedEESP(c3, c4)
        self.level4 = nn.Sequential(*(EESP(c4, c4, LEVEL_4_DILATIONS) for _ in range(7)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        quarter = _halve(_halve(x))
        eighth = _halve(quarter)
        level1 = self.level1(x)
        level2 = self.level2_0(level1, quarter)
        level3 = self.level3(self.level3_0(level2, eighth))
        level4 = self.level4(self.level4_0(level3, _halve(eighth)))
        return level1, level2, level3, level4


class EESP(nn.Module):
    """The unit of Fig. 1c: grouped 1x1 reduction, parallel depth-wise dilated 3x3 convolutions whose results are summed
    one onto the next (hierarchical feature fusion), grouped 1x1 expansion of all of them, residual connection."""

    def __init__(self, inputs: int, outputs: int, dilations: Iterable[int], stride: int = 1) -> None:
        super().__init__()
        width = outputs // BRANCHES
        self.stride = stride
        self.proj_1x1 = _conv_norm_act(inputs, width, 1, groups=BRANCHES)
        self.spp_dw = nn.ModuleList(
            _named(conv=_conv(width, width, 3, stride=stride, dilation=dilation, groups=width))
            for dilation in dilations
        )
        self.br_after_cat = _named(bn=nn.BatchNorm2d(outputs), act=nn.PReLU(outputs))
        self.conv_1x1_exp = _named(conv=_conv(outputs, outputs, 1, groups=BRANCHES), bn=nn.BatchNorm2d(outputs))
        self.module_act = nn.PReLU(outputs)  # the published weights have one in strided units too, which never use it

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.proj_1x1(x)
        fused = itertools.accumulate(branch(reduced) for branch in self.spp_dw)
        expanded = self.conv_1x1_exp(self.br_after_cat(torch.cat(list(fused), dim=1)))
        return expanded if self.stride > 1 else self.module_act(expanded + x)


class StridedEESP(nn.Module):
    """The down-sampling unit of Fig. 2: averaged input and strided EESP side by side, plus the image itself at this size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.eesp = EESP(inputs, outputs - inputs, LEVEL_3_DILATIONS, stride=2)
        self.inp_reinf = nn.Sequential(
            _conv_norm_act(3, 3, 3), _named(conv=_conv(3, outputs, 1), bn=nn.BatchNorm2d(outputs))
        )
        self.act = nn.PReLU(outputs)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """x: (N, inputs, h, w); image: (N, 3, ⌈h/2⌉, ⌈w/2⌉)."""
        return self.act(torch.cat([_halve(x), self.eesp(x)], dim=1) + self.inp_reinf(image))


class PyramidPool(nn.Module):
    """Efficient pyramid pooling: depth-wise 3x3 convolutions at five sizes of the projected features, shuffled, merged."""

    def __init__(self, inputs: int, projected: int, outputs: int, *, last: bool = False) -> None:
        super().__init__()
        joined = projected * len(POOLING_SCALES)
        self.projection_layer = _named(cbr=nn.Sequential(_conv(inputs, projected, 1), *_norm_act(projected)))
        self.stages = nn.ModuleList(_conv(projected, projected, 3, groups=projected) for _ in POOLING_SCALES)
        merging = _conv(joined, projected, 3, groups=projected)
        self.merge_layer = nn.Sequential(
            _named(br=nn.Sequential(*_norm_act(joined))),
            nn.ChannelShuffle(len(POOLING_SCALES)),
            _named(cbr=nn.Sequential(merging, *_norm_act(projected))),
            nn.Conv2d(projected, outputs, 1, bias=last),
        )
        self.br = nn.Identity() if last else _named(br=nn.Sequential(*_norm_act(outputs)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection_layer(x)
        pooled = [self._at_scale(x, scale, stage) for scale, stage in zip(POOLING_SCALES, self.stages, strict=True)]
        return self.br(self.merge_layer(torch.cat(pooled, dim=1)))

    @staticmethod
    def _at_scale(x: Tensor, scale: float, stage: nn.Module) -> Tensor:
        """Averaging shrinks and interpolation enlarges, whichever of the two comes first."""
        height, width = x.shape[2:]
        size = (max(math.ceil(height * scale), SMALLEST_POOLED), max(math.ceil(width * scale), SMALLEST_POOLED))
        if scale < 1:
            return _resize(stage(F.adaptive_avg_pool2d(x, size)), x)
        if scale > 1:
            enlarged = F.interpolate(x, size, mode="bilinear", align_corners=True)
            return F.adaptive_avg_pool2d(stage(enlarged), (height, width))
        return stage(x)


class Merge(nn.Module):
    """Encoder features on their way into the decoder: grouped 3x3 convolution, channels weighted by the global average."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.wt_layer = nn.Sequential(nn.AdaptiveAvgPool2d(1), _conv(inputs, outputs, 1), nn.Sigmoid())
        grouped = _conv(inputs, outputs, 3, groups=math.gcd(inputs, outputs))
        self.expansion_layer = _named(cbr=nn.Sequential(grouped, *_norm_act(outputs)))

    def forward(self, x: Tensor) -> Tensor:
        return self.expansion_layer(x) * self.wt_layer(x)


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)


def _norm_act(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(channels), nn.PReLU(channels)


def _conv_norm_act(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    bn, act = _norm_act(outputs)
    return _named(conv=_conv(inputs, outputs, kernel, stride=stride, groups=groups), bn=bn, act=act)


def _halve(x: Tensor) -> Tensor:
    """(N, C, h, w) to (N, C, ⌈h/2⌉, ⌈w/2⌉), as a strided 3x3 convolution does."""
    return F.avg_pool2d(x, kernel_size=3, stride=2, padding=1)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    """x at the height and width of another tensor."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)
