"""The PatchGAN discriminator of pix2pix and CUT."""

from torch import Tensor, nn

from trainer.networks.compiling import Compilable, whole
from trainer.networks.norm import InstanceNorm2d
from trainer.networks.resample import BlurDownsample
from trainer.networks.sizes import Sizes, smallest_side


class PatchDiscriminator(Compilable):
    """(B, in_channels, H, W) in [-1, 1] -> (B, 1, H//8 - 2, W//8 - 2) raw scores, one for each patch; with the default three
    layers H, W >= 24, otherwise see `sizes`.

    With the default three layers this is the 70x70 PatchGAN of Isola et al. 2017: strided convolutions, and a score
    sees 70x70 pixels (`antialias=False`). CUT blurs before it subsamples (`antialias=True`), and a score sees 84x84.
    No norm on the first and last convolution.
    `self.model` has the module order of the published code, so checkpoints exchange by name.
    affine: the norms have weights, as in DistanceGAN's code.
    """

    def __init__(
        self, in_channels: int = 3, ndf: int = 64, layers: int = 3, antialias: bool = True, *, affine: bool = False
    ) -> None:
        super().__init__()
        self.stride = 2**layers  # pixels from one patch to the next
        widths = [ndf * min(2**n, 8) for n in range(layers + 1)]
        model: list[nn.Module] = []
        for n, width in enumerate(widths):
            halve = n < layers
            stride = 2 if halve and not antialias else 1
            model += [nn.Conv2d(widths[n - 1] if n else in_channels, width, 4, stride=stride, padding=1)]
            if n:
                # Not guarded: what a generator makes at first is nearly of one colour, and has to learn from D.
                model += [
                    InstanceNorm2d(width, slope=0.2, affine=affine),
                    nn.Identity(),
                ]  # the published LeakyReLU has its own place
            else:
                model += [nn.LeakyReLU(0.2, inplace=True)]
            if halve and antialias:
                model += [BlurDownsample(width)]
        model += [nn.Conv2d(widths[-1], 1, 4, padding=1)]
        self.model = nn.Sequential(*model)

    @property
    def sizes(self) -> Sizes:
        """The images that leave at least one score."""
        return Sizes(smallest=smallest_side(self.model))

    @whole
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)
