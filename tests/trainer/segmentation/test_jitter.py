"""Random looks of a segmenter's training images: the same for any ranks, none by default, and what each part of them does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.draws import Draws
from trainer.methods.base import StepContext
from trainer.segmentation import jitter
from trainer.segmentation.jitter import jittered
from trainer.segmentation.method import Segmentation

PARTS = ("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE", "GAMMA", "BLUR", "NOISE")


def images(count: int = 4, size: int = 24) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, size // 4, size // 4, generator=draw)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return (smooth * 1.6 - 0.8).contiguous(memory_format=torch.channels_last)


def looks(strength: float = 1.0, seed: int = 0, step: int = 0, slots: range = range(4)) -> Tensor:
    return jittered(images()[slots.start : slots.stop], torch.tensor(slots), strength, Draws(seed, step))


def test_a_look_is_of_the_seed_the_step_and_the_slot_and_of_no_rank() -> None:
    whole = looks()
    assert torch.equal(whole, looks()) and torch.equal(
        whole, torch.cat([looks(slots=range(1)), looks(slots=range(1, 4))])
    )
    assert not torch.equal(whole, looks(seed=1)) and not torch.equal(whole, looks(step=1))
    same = jittered(images()[:1].expand(2, -1, -1, -1), torch.tensor([0, 1]), 1.0, Draws(0, 0))
    assert (same[0] - same[1]).abs().mean() > 0.05
    assert (
        whole.is_contiguous(memory_format=torch.channels_last)
        and whole.abs().max() <= 1
        and whole.dtype == torch.float32
    )


def test_it_grows_with_its_strength() -> None:
    away = [(looks(strength) - images()).abs().mean().item() for strength in (0.0, 0.1, 0.5, 1.0)]
    assert away[0] < 1e-5 and 0.01 < away[1] < away[2] < away[3] and away[3] > 0.1


def only(monkeypatch: pytest.MonkeyPatch, part: str) -> tuple[Tensor, Tensor]:
    """Images and their looks where all else is left alone, in [0, 1]."""
    for name in PARTS:
        monkeypatch.setattr(jitter, name, getattr(jitter, name) if name == part else 0.0)
    return (images() + 1) / 2, (looks() + 1) / 2


def grey(x: Tensor) -> Tensor:
    return 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]


@pytest.mark.parametrize("part", PARTS)
def test_each_part_does_what_its_name_says(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = only(monkeypatch, part)
    inside = ((after > 0.001) & (after < 0.999)).all(1)  # where nothing was cut off
    change = after - before
    assert change.abs().amax((1, 2, 3)).median() > 0.003
    for n in range(4):
        one, two, kept = before[n, :, inside[n]].double(), after[n, :, inside[n]].double(), int(inside[n].sum())
        assert kept > 100
        if part == "BRIGHTNESS":
            assert torch.allclose(two / one, (two / one).mean(), rtol=1e-3)
        elif part == "GAMMA":
            powers = two.log() / one.log()
            assert torch.allclose(powers, powers.mean(), rtol=1e-3)
        elif part == "CONTRAST":
            middle = grey(before[n : n + 1].double()).mean()
            factor = (two - middle)[(one - middle).abs() > 0.05] / (one - middle)[(one - middle).abs() > 0.05]
            assert torch.allclose(factor, factor.mean(), rtol=1e-3)
        elif part in ("SATURATION", "HUE"):
            assert torch.allclose(grey(two[None]), grey(one[None]), atol=1e-3)
            length = [(each - grey(each[None])).norm(dim=0) for each in (one, two)]
            ratio = length[1][length[0] > 0.05] / length[0][length[0] > 0.05]
            assert torch.allclose(ratio, ratio.mean(), rtol=1e-3) == (part == "SATURATION")
        elif part == "BLUR":
            steps = [each[n].diff(dim=2).square().mean() for each in (before, after)]
            assert steps[1] < steps[0] and (before[n].mean() - after[n].mean()).abs() < 0.01
        else:
            noise = (two - one).flatten()
            assert noise.mean().abs() < 0.01 and 0 < noise.std() <= 1.1 * jitter.NOISE


def seen(strength: float) -> Tensor:
    """What the network gets in training."""
    network: Any = nn.Identity()
    network.stride = 1
    batch = SimpleNamespace(images=images(), labels=torch.zeros(4, 24, 24), slots=torch.arange(4))
    return Segmentation(network, strength)(batch, StepContext(Draws(0, 0)))


def test_a_network_is_trained_on_it_and_without_on_the_images_themselves() -> None:
    assert torch.equal(seen(1.0), looks()) and torch.equal(seen(0.0), images())
