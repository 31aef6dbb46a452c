"""The projection heads F_k of CUT: patches of a feature map become unit vectors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from infra.errors import UserError


def normalise(x: Tensor, rule: str) -> Tensor:
    """Rows (N, C) to unit length, each repository's way: x / (|x| + 1e-7) in CUT, y / |y| with y = x + 1e-12 in SRUNIT.

    With the published initialisation |x| is about 1e-6, so the choice is visible: it moves CUT's first NCE by 3.7 %.
    """
    match rule:
        case "cut":
            return x / (x.norm(dim=-1, keepdim=True) + 1e-7)
        case "srunit":
            shifted = x + 1e-12
            return shifted / shifted.norm(dim=-1, keepdim=True)
        case _:
            raise UserError(f"normalisation {rule} does not exist: choose cut or srunit")


def sample_patches(feature: Tensor, ids: Tensor) -> Tensor:
    """The pixels `ids` (n,), flat positions y * W + x, of each map of (B, C, H, W): (B * n, C), image-major."""
    return feature.flatten(2).transpose(1, 2).index_select(1, ids).flatten(0, 1)


class ProjectionHeads(nn.Module):
    """One head for each tap: sample patches, Linear - ReLU - Linear, normalise (PatchSampleF of the published code).

    channels: those of the features at each tap (`ResnetGenerator.tap_channels`). dim: length of the vectors.
    use_mlp=False leaves the linear layers out, so vectors have the length of the features.
    """

    def __init__(
        self, channels: Sequence[int], dim: int = 256, normalisation: str = "cut", use_mlp: bool = True
    ) -> None:
        super().__init__()
        self.normalisation = normalisation
        for index, width in enumerate(channels):
            head = nn.Sequential(nn.Linear(width, dim), nn.ReLU(), nn.Linear(dim, dim)) if use_mlp else nn.Identity()
            self.add_module(f"mlp_{index}", head)  # the published name

    def forward(
        self, features: Sequence[Tensor], ids: Sequence[Tensor], heads: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Project patches of feature maps (B, C_k, H_k, W_k).

        ids: for each map the flat positions (n_k,) int64, the same for every image of the batch.
        heads: which head each map goes through; all of them in order if None.
        Returns (B * n_k, dim) unit rows for each map, image-major, float32 or wider: with the published
        initialisation a head's output is about 1e-7, below what half precision holds, so autocast is off inside.
        """
        heads = range(len(features)) if heads is None else heads
        rows = []
        for index, feature, positions in zip(heads, features, ids, strict=True):
            x = sample_patches(feature, positions)
            with torch.autocast(x.device.type, enabled=False):
                x = self.get_submodule(f"mlp_{index}")(x.to(torch.promote_types(x.dtype, torch.float32)))
                rows.append(normalise(x, self.normalisation))
        return rows
