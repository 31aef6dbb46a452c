"""The dilated residual network DRN-D-22, with which the CUT supplement measures Cityscapes scores."""

from collections.abc import Iterator

from torch import Tensor, nn

CHANNELS = (16, 32, 64, 128, 256, 512, 512, 512)  # of layers 1 to 8


class BasicBlock(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))): (N, inputs, h, w) -> (N, outputs, ceil(h/stride), …)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3(inputs, outputs, stride, dilation)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = _conv3(outputs, outputs, 1, dilation)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.downsample(x) + self.bn2(self.conv2(y)))


class Drn(nn.Module):
    """DRN-D-22: (N, 3, h, w) normalised RGB -> (N, classes, ceil(h/8), ceil(w/8)) logits, to be resized by the caller.

    Yu, Koltun and Funkhouser, "Dilated Residual Networks", CVPR 2017, Sec. 4 and Fig. 5 (c): no max pooling; the last
    two stages are dilated in place of strided; layers 7 and 8 smooth the gridding away and have no shortcuts. The
    modules have the published names, so the published ImageNet weights load into `Drn(1000)` by name.

    width: the channels as a multiple of the paper's. stride: pixels per deepest feature.
    """

    stride = 8

    def __init__(self, classes: int, width: float = 1.0) -> None:
        super().__init__()
        c1, c2, c3, c4, c5, c6, c7, c8 = (max(1, round(channels * width)) for channels in CHANNELS)
        self.layer0 = nn.Sequential(nn.Conv2d(3, c1, 7, padding=3, bias=False), nn.BatchNorm2d(c1), nn.ReLU())
        self.layer1 = nn.Sequential(*_plain(c1, c1))
        self.layer2 = nn.Sequential(*_plain(c1, c2, stride=2))
        self.layer3 = nn.Sequential(BasicBlock(c2, c3, stride=2), BasicBlock(c3, c3))
        self.layer4 = nn.Sequential(BasicBlock(c3, c4, stride=2), BasicBlock(c4, c4))
        self.layer5 = nn.Sequential(BasicBlock(c4, c5, dilation=2), BasicBlock(c5, c5, dilation=2))
        self.layer6 = nn.Sequential(BasicBlock(c5, c6, dilation=4), BasicBlock(c6, c6, dilation=4))
        self.layer7 = nn.Sequential(*_plain(c6, c7, dilation=2))
        self.layer8 = nn.Sequential(*_plain(c7, c8))
        self.fc = nn.Conv2d(c8, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def _conv3(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)


def _plain(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> Iterator[nn.Module]:
    yield _conv3(inputs, outputs, stride, dilation)
    yield nn.BatchNorm2d(outputs)
    yield nn.ReLU()
