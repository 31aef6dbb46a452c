"""Recordings of published code: where they are, and how a test takes one.

A compact set lies in the repository (recordings/README.md). A folder named by the environment variable ORACLES, by
default ../shared/oracles beside the repository, adds to it: every file of each kind that is there is replayed too.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

COMPACT = Path(__file__).parent / "recordings"
MORE = Path(os.environ.get("ORACLES", Path(__file__).parents[4] / "shared" / "oracles"))
if "ORACLES" in os.environ and not MORE.is_dir():
    raise NotADirectoryError(f"ORACLES={MORE} names no folder of recordings")


class Recording:
    """One file of recorded arrays; floats are float64 (the compact set keeps those of few bits as float16), names that are not
    there raise KeyError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        self.arrays = np.load(path)
        self.keys = self.arrays.files

    def __getitem__(self, key: str) -> Tensor:
        values = self.arrays[key]
        return torch.from_numpy(values.astype(np.float64) if values.dtype == np.float16 else values)

    def __contains__(self, key: str) -> bool:
        return key in self.keys

    def plain(self, key: str) -> Any:
        """As a Python number, string or list of them."""
        return self.arrays[key].tolist()

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The arrays whose names begin so, by the rest of their names."""
        return {key.removeprefix(prefix): self[key] for key in self.keys if key.startswith(prefix)}

    def before(self, suffix: str) -> list[str]:
        """The beginnings of the names that end so: the tags of the cases that a file has."""
        tags = [key.removesuffix(suffix) for key in self.keys if key.endswith(suffix)]
        assert tags, f"{self.name} has no case with {suffix}"
        return tags

    def beside(self, name: str) -> "Recording":
        """Another file of the same folder."""
        return Recording(self.path.with_name(f"{name}.npz"))


def each(
    pattern: str, suits: Callable[[Recording], bool] = lambda recording: True, *, compact: bool = True
) -> pytest.MarkDecorator:
    """Run a test once for every file of a kind, or those of them that suit, as its argument `recording` (a fixture of
    conftest.py). compact: false for a kind too large for the compact set, whose test is skipped where there are no others."""
    paths = [path for folder in (COMPACT, MORE) for path in sorted(folder.glob(pattern)) if suits(Recording(path))]
    assert not compact or any(path.parent == COMPACT for path in paths), f"the compact set lacks {pattern}"
    cases = [pytest.param(path, id=f"{path.parent.name}/{path.stem}") for path in paths]
    return pytest.mark.parametrize("recording", cases, indirect=True)


def assert_same(actual: Tensor | float, expected: Tensor | float, tolerance: float = 1e-10) -> None:
    """Equal to `tolerance`, relative to the largest expected value."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)
