"""Two scales of one image: a coarse view of the whole and a fine one of windows, fused by a learned scale map.

Hoyer et al. 2022, "HRDA: Context-Aware High-Resolution Domain-Adaptive Semantic Segmentation", Sec. 3.2 and 3.3; the map is
found by atrous spatial pyramid pooling (Chen et al. 2017).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.networks.norm import InstanceNorm2d
from trainer.networks.resample import BlurUpsample
from trainer.networks.split import split_batch

Corner = Sequence[int]  # (x, y) of the left upper corner of a window, in pixels
DILATIONS = (6, 12, 18)


class ScaleFusion(nn.Module):
    """Features of a coarse view (B, channels, h, w) to its scale map, (B, 1, H, W) in [0, 1]: how far to rely on the fine view.

    The mean over the map and a 1x1 convolution; a 1x1 convolution; 3x3 convolutions of three dilations; their results together
    through a 3x3 convolution, and to one channel. All with instance norm and ReLU, but the mean, which is one pixel.
    `start_even` makes the map 1/2 everywhere.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()

        def layer(inputs: int, kernel: int, dilation: int) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, channels, kernel, padding=dilation * (kernel // 2), dilation=dilation)
            return nn.Sequential(convolution, InstanceNorm2d(channels, slope=0.0, guarded=True))

        self.pooled = nn.Conv2d(channels, channels, 1)
        self.branches = nn.ModuleList(
            [layer(channels, 1, 1), *(layer(channels, 3, dilation) for dilation in DILATIONS)]
        )
        self.bottleneck = layer((2 + len(DILATIONS)) * channels, 3, 1)
        self.output = nn.Conv2d(channels, 1, 1)
        # Bilinear resizing by 2, which is this blur: no other kernels, and a gradient that is summed in one order.
        self.enlarge_image, self.enlarge_map = BlurUpsample(3), BlurUpsample(1)

    def start_even(self) -> None:
        nn.init.zeros_(self.output.weight)
        assert self.output.bias is not None
        nn.init.zeros_(self.output.bias)

    def forward(self, features: Tensor, size: Sequence[int]) -> Tensor:
        """size: (H, W) of the map."""
        found = [branch(features) for branch in self.branches]
        mean = self.pooled(F.avg_pool2d(features, features.shape[2:])).relu()  # whose gradient keeps the layout
        found.append(mean + torch.zeros_like(found[0]))
        scale = self.output(self.bottleneck(torch.cat(found, dim=1))).sigmoid()
        return F.interpolate(scale, tuple(size), mode="bilinear")

    def fuse(self, coarse: Tensor, fine: Tensor, scale: Tensor) -> Tensor:
        """The coarse picture (B, 3, H, W) enlarged by 2, and the fine one (B, 3, 2H, 2W) as far as the scale map (B, 1, H, W)
        says; (B, 3, 2H, 2W), between the smallest and the largest of both."""
        return self.enlarge_image((1 - scale) * coarse) + self.enlarge_map(scale) * fine

    def fuse_windows(self, coarse: Tensor, fine: Tensor, scale: Tensor, corners: Sequence[Corner]) -> Tensor:
        """The same where the fine picture is one window (B, 3, h, w) of each image: outside, all relies on the coarse one.

        corners: of the windows, even numbers of pixels of the fused picture.
        """
        inside = torch.ones_like(fine[:, :1, ::2, ::2])
        mask = paste(inside, [(x // 2, y // 2) for x, y in corners], coarse.shape[2:])
        size = [2 * side for side in coarse.shape[2:]]
        return self.fuse(coarse, paste(fine, corners, size), scale * mask)


def halved(images: Tensor) -> Tensor:
    """(B, C, H, W), of even sides, to (B, C, H/2, W/2), bilinearly: the means of 2x2 pixels."""
    return F.avg_pool2d(images, 2)


def cut(images: Tensor, corners: Sequence[Corner], side: int) -> Tensor:
    """A window of each image (B, C, H, W): (B, C, side, side), in the layout of the images, as is the gradient."""
    height, width = images.shape[2:]
    parts = split_batch(images, [1] * len(images))
    return torch.cat(
        [
            F.pad(image, (-x, x + side - width, -y, y + side - height))
            for image, (x, y) in zip(parts, corners, strict=True)
        ]
    )


def paste(windows: Tensor, corners: Sequence[Corner], size: Sequence[int]) -> Tensor:
    """Windows (B, C, h, w), each at its corner in a picture (B, C, *size) that is 0 elsewhere."""
    (height, width), (rows, columns) = size, windows.shape[2:]
    parts = split_batch(windows, [1] * len(windows))
    return torch.cat(
        [
            F.pad(window, (x, width - columns - x, y, height - rows - y))
            for window, (x, y) in zip(parts, corners, strict=True)
        ]
    )


def slide(translate: Callable[[Tensor], Tensor], images: Tensor, side: int) -> Tensor:
    """Translate images (B, C, H, W) window by window, of this side or the image's where that is smaller, half overlapping, and
    take the mean where they overlap."""
    total, count = torch.zeros_like(images), torch.zeros_like(images[:1, :1])
    for rows in _windows(images.shape[2], side):
        for columns in _windows(images.shape[3], side):
            total[:, :, rows, columns] += translate(images[:, :, rows, columns])
            count[:, :, rows, columns] += 1
    return total / count


def _windows(extent: int, side: int) -> Iterator[slice]:
    side = min(side, extent)
    for start in [*range(0, extent - side, side // 2), extent - side]:
        yield slice(start, start + side)
