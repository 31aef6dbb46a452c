"""Translations in tiles: the numbers of the whole image, for every method that can; and the others say so."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from infra.errors import UserError
from tests.trainer.small import method_config
from trainer.tiling import Tiles, in_tiles, maps
from trainer.translation import Translation
from trainer.translator import Translator

TILED = ("cut", "cyclegan", "distancegan", "gcgan", "munit", "sincut", "srunit")
WHOLE_ONLY = ("drit", "semst")


def make(method: str) -> Translation:
    torch.manual_seed(0)
    translation = method_config(method).translation().double().eval()
    for parameter in translation.parameters():
        parameter.data.normal_(0, 0.1) if parameter.dim() > 1 else parameter.data.normal_(0.5, 0.2)
    return translation


def image(height: int, width: int) -> Tensor:
    """Noise over a slope, so that tiles have other statistics than the whole."""
    x = torch.randn(1, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 4
    return (x + torch.linspace(-1, 1, width, dtype=torch.float64)).clamp(-1, 1)


def tiled(translation: Translation, x: Tensor, side: int, codes: Tensor | None, direction: str) -> Tensor:
    result = torch.full_like(x, float("nan"))

    def write(rows: tuple[int, int], columns: tuple[int, int], part: Tensor) -> None:
        result[:, :, slice(*rows), slice(*columns)] = part

    def read(rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        return x[:, :, slice(*rows), slice(*columns)].clone()

    in_tiles(translation, Tiles(side), read, (x.shape[2], x.shape[3]), codes, direction, write)
    return result


# 4 bytes: what lies between the residual blocks. Without these, which sincut has at a higher resolution, each block would
# compute the one before twice.
@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "kept"),
    [*((method, 10**9) for method in TILED), *((method, 4) for method in TILED if method != "sincut")],
)
def test_tiles_have_the_numbers_of_the_whole_image(method: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "KEPT", kept)
    translation, x = make(method), image(132, 84 if method != "sincut" else 86)
    shape = translation.code_shape(*x.shape[2:])
    codes = None if shape is None else torch.randn(1, *shape, dtype=torch.float64)
    for direction in translation.directions[-1:]:
        whole = translation(x, codes, direction)
        made = tiled(translation, x, 64, codes, direction)
        torch.testing.assert_close(made, whole, rtol=0, atol=1e-9)
        assert whole.std() > 1e-3
        if method != "sincut":  # which has no norms
            separate = torch.cat([translation(part, codes, direction) for part in x.split(44, dim=2)], dim=2)
            assert (separate - whole).abs().max() > 1e-3  # which tiles by themselves have not


@pytest.mark.parametrize("method", WHOLE_ONLY)
def test_networks_that_cannot_work_in_tiles_say_so(method: str) -> None:
    translation = method_config(method).translation().eval()
    translator = Translator(translation, tiles=Tiles(64))
    with pytest.raises(UserError, match="cannot work in tiles .*: leave out --tile"):
        translator(np.zeros((128, 128, 3), np.uint8))
    assert translator(np.zeros((64, 64, 3), np.uint8)).shape == (64, 64, 3)  # no larger than a tile


def test_pictures_of_any_size_are_off_by_a_rounding_at_most() -> None:
    translation = make("cut").float()
    picture = np.random.default_rng(0).integers(0, 65536, (101, 139, 3)).astype(np.uint16)
    seen: list[tuple[int, int]] = []
    translator = Translator(translation, tiles=Tiles(64, on_tile=lambda done, total: seen.append((done, total))))
    for dtype, scale in ((np.uint8, 257), (np.uint16, 1)):
        given = (picture // scale).astype(dtype)
        whole, made = Translator(translation)(given), translator(given)
        assert made.dtype == dtype and made.shape == whole.shape
        assert np.abs(made.astype(int) - whole).max() <= 257 / scale / 100 + 1
    total = seen[0][1]
    assert seen == [(done, total) for done in range(1, total + 1)] * 2


def test_a_tile_is_not_tiny() -> None:
    with pytest.raises(UserError, match="tiles of 63 pixels are mostly edge: give 64 or more"):
        Tiles(63)


PEAK = """
import resource, sys
import numpy as np, torch
from tests.trainer.test_tiling import make
from trainer.tiling import Tiles
from trainer.translator import Translator
torch.set_num_threads(1)
translator = Translator(make("cut").float(), tiles=Tiles(128))
translator(np.zeros((256, 256, 3), np.uint8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
translator(np.zeros((int(sys.argv[1]), int(sys.argv[1]), 3), np.uint8))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_image() -> None:
    """Beside the image and its translation, six bytes a pixel; the widest features of the whole have 8 channels of 4 bytes."""
    side = 1024
    root = Path(__file__).parents[2]
    shown = subprocess.run(
        [sys.executable, "-c", PEAK, str(side)], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert int(shown) * 1024 < side * side * 6 + 12 * 2**20
