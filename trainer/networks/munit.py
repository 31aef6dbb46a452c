"""MUNIT's auto-encoder of one domain: content encoder, style encoder and a decoder that takes both (Huang et al. 2018,
"Multimodal Unsupervised Image-to-Image Translation", Sec. 5.1)."""

import torch
from torch import Tensor, nn

from trainer.networks.blocks import conv_block, style_encoder
from trainer.networks.compiling import Compilable, whole
from trainer.networks.generator import ResnetBlock
from trainer.networks.norm import InstanceNorm2d
from trainer.networks.padding import Pad2d
from trainer.networks.resample import Doubled
from trainer.networks.sizes import Sizes, smallest_side


class AdaptiveBlock(nn.Module):
    """A residual block whose instance norms take shift and scale from the style: (B, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(Pad2d(1), nn.Conv2d(channels, channels, 3)) for _ in range(2))
        self.norm = InstanceNorm2d(channels, guarded=True)

    def forward(self, x: Tensor, affine: Tensor) -> Tensor:
        """affine: (B, 4, C): shift and scale of the first norm, then of the second."""
        shift, scale, shift_2, scale_2 = affine[..., None, None].unbind(dim=1)
        y = torch.addcmul(shift, self.norm(self.first(x)), scale).relu_()
        return x + torch.addcmul(shift_2, self.norm(self.second(y)), scale_2)


class Decoder(nn.Module):
    """(B, 4 ngf, H, W) and (B, blocks, 4, 4 ngf) -> (B, 3, 4 H, 4 W) in (-1, 1)."""

    def __init__(self, *, ngf: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AdaptiveBlock(4 * ngf) for _ in range(blocks))
        self.image = nn.Sequential(
            Doubled(),
            *conv_block(4 * ngf, 2 * ngf, 5, norm="sample deviation"),
            Doubled(),
            *conv_block(2 * ngf, ngf, 5, norm="sample deviation"),
            *conv_block(ngf, 3, 7, slope=1.0),
            nn.Tanh(),
        )

    def forward(self, content: Tensor, affine: Tensor) -> Tensor:
        for block, of_block in zip(self.blocks, affine.unbind(dim=1), strict=True):
            content = block(content, of_block)
        return self.image(content)


class AutoEncoder(Compilable):
    """Images (B, 3, H, W) in [-1, 1], H and W multiples of 4; contents (B, 4 ngf, H/4, W/4); styles (B, style).

    hidden: width of the MLP that makes shifts and scales of the decoder's norms from a style.
    """

    def __init__(self, *, ngf: int = 64, blocks: int = 4, style: int = 8, hidden: int = 256) -> None:
        super().__init__()
        wide = 4 * ngf
        self.style_encoder = style_encoder(ngf, style)
        self.content_encoder = nn.Sequential(
            *conv_block(3, ngf, 7, norm="instance"),
            *conv_block(ngf, 2 * ngf, 4, stride=2, norm="instance"),
            *conv_block(2 * ngf, wide, 4, stride=2, norm="instance"),
            *(ResnetBlock(wide) for _ in range(blocks)),
        )
        self.decoder = Decoder(ngf=ngf, blocks=blocks)
        self.mlp = nn.Sequential(
            nn.Linear(style, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, blocks * 4 * wide),
            nn.Unflatten(1, (blocks, 4, wide)),
        )

    @property
    def sizes(self) -> Sizes:
        encoders = [smallest_side(encoder) for encoder in (self.style_encoder, self.content_encoder)]
        return Sizes(multiple=4, smallest=max(encoders))

    @whole
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Content and style."""
        return self.content_encoder(x), self.style_encoder(x)

    @whole
    def encode_content(self, x: Tensor) -> Tensor:
        return self.content_encoder(x)

    @whole
    def decode(self, content: Tensor, style: Tensor) -> Tensor:
        return self.decoder(content, self.mlp(style))
