"""Inception V3 as FID and KID use it: the network whose weights TensorFlow published in 2015."""

import hashlib
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.errors import UserError

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

SIZE = 299  # pixels, height and width of the input
_ROW, _COLUMN = (1, 7), (7, 1)  # kernels, height by width


def load_inception(path: str | Path, device: torch.device | str) -> "InceptionV3":
    """The network with the published weights, in evaluation mode and without gradients.

    path: the file at WEIGHTS_URL, in its published form: the SHA-256 is checked before anything is made of its bytes.
    UserError if it is missing or another file.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the Inception weights {path} ({error.strerror}): fetch {WEIGHTS_URL}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise UserError(
            f"{path} is not the published Inception for FID: its SHA-256 begins with {digest[:8]} in place of "
            f"{WEIGHTS_SHA256[:8]}; fetch {WEIGHTS_URL}"
        )
    network = InceptionV3()
    network.load_state_dict(torch.load(BytesIO(data), map_location="cpu", weights_only=True))
    return network.to(device).eval().requires_grad_(False)


class InceptionV3(nn.Module):
    """(N, 3, 299, 299) in [-1, 1] -> (N, 2048): the activations of the last average pooling, none negative.

    Inception V3 (Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", Sec. 6, Table 1 and
    Fig. 5 to 7, 10) with batch norm after each convolution, without the auxiliary head. It departs from the paper where
    the network of FID (Heusel et al. 2017) does: average poolings leave the padding out of the mean, and the last
    block pools by maximum. Module names are those of the published weights; `fc`, which scores 1008 classes, is among
    them but not used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padding="valid")
        self.Mixed_5b = BlockA(192, pool_width=32)
        self.Mixed_5c = BlockA(256, pool_width=64)
        self.Mixed_5d = BlockA(288, pool_width=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, width=128)
        self.Mixed_6c = BlockC(768, width=160)
        self.Mixed_6d = BlockC(768, width=160)
        self.Mixed_6e = BlockC(768, width=192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False))
        self.Mixed_7c = BlockE(2048, nn.MaxPool2d(3, stride=1, padding=1))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        x = _chain(x, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3)
        x = F.max_pool2d(x, 3, stride=2)  # (N, 64, 73, 73)
        x = _chain(x, self.Conv2d_3b_1x1, self.Conv2d_4a_3x3)
        x = F.max_pool2d(x, 3, stride=2)  # (N, 192, 35, 35)
        x = _chain(x, self.Mixed_5b, self.Mixed_5c, self.Mixed_5d)  # (N, 288, 35, 35)
        x = _chain(x, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e)  # (N, 768, 17, 17)
        x = _chain(x, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c)  # (N, 2048, 8, 8)
        return x.mean(dim=(2, 3))


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU. A strided one is not padded, any other keeps the size."""

    def __init__(
        self, channels: int, width: int, kernel: int | tuple[int, int], stride: int = 1, padding: str | None = None
    ) -> None:
        super().__init__()
        padding = padding or ("same" if stride == 1 else "valid")
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class BlockA(nn.Module):
    """(N, channels, H, W) -> (N, 224 + pool_width, H, W): Fig. 5, with the 5x5 convolution left whole."""

    def __init__(self, channels: int, pool_width: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(channels, 64, 1)
        self.branch5x5_1 = ConvNorm(channels, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5)
        self.branch3x3dbl_1 = ConvNorm(channels, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3)
        self.branch_pool = ConvNorm(channels, pool_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.branch1x1(x),
            _chain(x, self.branch5x5_1, self.branch5x5_2),
            _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            self.branch_pool(_average(x)),
        )
        return torch.cat(branches, dim=1)


class BlockB(nn.Module):
    """(N, channels, H, W) -> (N, 480 + channels, H', W') with H' = (H - 1) // 2: Fig. 10."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(channels, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.branch3x3(x),
            _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            F.max_pool2d(x, 3, stride=2),
        )
        return torch.cat(branches, dim=1)


class BlockC(nn.Module):
    """(N, channels, H, W) -> (N, 768, H, W): Fig. 6, whose 7x7 convolutions are split into rows and columns."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(channels, 192, 1)
        self.branch7x7_1 = ConvNorm(channels, width, 1)
        self.branch7x7_2 = ConvNorm(width, width, _ROW)
        self.branch7x7_3 = ConvNorm(width, 192, _COLUMN)
        self.branch7x7dbl_1 = ConvNorm(channels, width, 1)
        self.branch7x7dbl_2 = ConvNorm(width, width, _COLUMN)
        self.branch7x7dbl_3 = ConvNorm(width, width, _ROW)
        self.branch7x7dbl_4 = ConvNorm(width, width, _COLUMN)
        self.branch7x7dbl_5 = ConvNorm(width, 192, _ROW)
        self.branch_pool = ConvNorm(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = (self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3, self.branch7x7dbl_4)
        branches = (
            self.branch1x1(x),
            _chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3),
            _chain(x, *double, self.branch7x7dbl_5),
            self.branch_pool(_average(x)),
        )
        return torch.cat(branches, dim=1)


class BlockD(nn.Module):
    """(N, channels, H, W) -> (N, 512 + channels, H', W') with H' = (H - 1) // 2: the second reduction."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNorm(channels, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNorm(channels, 192, 1)
        self.branch7x7x3_2 = ConvNorm(192, 192, _ROW)
        self.branch7x7x3_3 = ConvNorm(192, 192, _COLUMN)
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            _chain(x, self.branch3x3_1, self.branch3x3_2),
            _chain(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4),
            F.max_pool2d(x, 3, stride=2),
        )
        return torch.cat(branches, dim=1)


class BlockE(nn.Module):
    """(N, channels, H, W) -> (N, 2048, H, W): Fig. 7, two of whose branches fork at their end.

    pool: what the last branch begins with; it keeps the size.
    """

    def __init__(self, channels: int, pool: nn.Module) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(channels, 320, 1)
        self.branch3x3_1 = ConvNorm(channels, 384, 1)
        self.branch3x3_2a = ConvNorm(384, 384, (1, 3))
        self.branch3x3_2b = ConvNorm(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvNorm(channels, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3)
        self.branch3x3dbl_3a = ConvNorm(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvNorm(384, 384, (3, 1))
        self.pool = pool
        self.branch_pool = ConvNorm(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        branches = (
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        )
        return torch.cat(branches, dim=1)


def _chain(x: Tensor, *modules: nn.Module) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _average(x: Tensor) -> Tensor:
    """Means over 3x3 neighbourhoods, in which the padding does not count; same shape."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
