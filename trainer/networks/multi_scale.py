"""The discriminator at several scales of pix2pixHD (Wang et al. 2018), as MUNIT and DRIT have it."""

import itertools

from torch import Tensor, nn

from trainer.networks.blocks import conv_block
from trainer.networks.compiling import Compilable, whole
from trainer.networks.sizes import Sizes, smallest_side


class MultiScaleDiscriminator(Compilable):
    """(B, 3, H, W) in [-1, 1] -> raw scores (B, 1, h, w) of each scale: the image, its half, its quarter, ….

    Each scale has its own weights: `layers` strided convolutions without a norm, which double the channels, and one of a
    single pixel. kernel: of the strided ones. slope: of the LeakyReLU. spectral: with spectral norm.
    """

    def __init__(
        self, *, ndf: int, scales: int = 3, layers: int = 4, kernel: int = 4, slope: float = 0.2, spectral: bool = False
    ) -> None:
        super().__init__()
        widths = [3, *(ndf * 2**n for n in range(layers))]

        def one() -> nn.Sequential:
            model: list[nn.Module] = []
            for inputs, outputs in itertools.pairwise(widths):
                model += conv_block(inputs, outputs, kernel, stride=2, slope=slope, spectral=spectral)
            return nn.Sequential(*model, *conv_block(widths[-1], 1, 1, slope=1.0, spectral=spectral))

        self.scales = nn.ModuleList(one() for _ in range(scales))
        self.halve = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)

    @property
    def sizes(self) -> Sizes:
        """The images that leave every scale a score."""
        return Sizes(smallest=smallest_side([self.halve] * (len(self.scales) - 1) + list(self.scales[-1].children())))

    @whole
    def forward(self, x: Tensor) -> list[Tensor]:
        scores = []
        for number, scale in enumerate(self.scales):
            x = self.halve(x) if number else x
            scores.append(scale(x))
        return scores
