"""The discriminator at several scales of pix2pixHD (Wang et al. 2018), as MUNIT and DRIT have it."""

import itertools

from torch import Tensor, nn

from trainer.networks.blocks import conv_block
from trainer.networks.sizes import Sizes, smallest_side


class MultiScaleDiscriminator(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> raw scores (B, 1, h, w) of each scale: the image, its half, its quarter, ….

    Each scale has its own weights: `layers` strided convolutions without a norm, which double the channels, and one of a
    single pixel. slope: of the LeakyReLU.
    """

    def __init__(self, *, ndf: int, scales: int = 3, layers: int = 4, slope: float = 0.2) -> None:
        super().__init__()
        self.scales = nn.ModuleList(self._one(ndf, layers, slope) for _ in range(scales))
        self.halve = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)

    @staticmethod
    def _one(ndf: int, layers: int, slope: float) -> nn.Sequential:
        widths = [3, *(ndf * 2**n for n in range(layers))]
        model = [
            layer
            for inputs, outputs in itertools.pairwise(widths)
            for layer in conv_block(inputs, outputs, 4, stride=2, slope=slope)
        ]
        return nn.Sequential(*model, nn.Conv2d(widths[-1], 1, 1))

    @property
    def sizes(self) -> Sizes:
        """The images that leave every scale a score."""
        return Sizes(smallest=smallest_side([self.halve] * (len(self.scales) - 1) + list(self.scales[-1].children())))

    def forward(self, x: Tensor) -> list[Tensor]:
        scores = []
        for number, scale in enumerate(self.scales):
            x = self.halve(x) if number else x
            scores.append(scale(x))
        return scores
