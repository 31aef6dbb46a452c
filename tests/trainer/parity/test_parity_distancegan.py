"""Replay of the published DistanceGAN: its distances and their statistics, and whole training steps, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.parity.recorded import Recording, assert_same, each
from tests.trainer.parity.replay import Pair, command_line
from tests.trainer.parity.strided import Published, assert_same_initialisation, job_of, replay
from trainer.draws import Draws
from trainer.losses import distance_changes, pair_distances, self_distances
from trainer.methods.base import StepContext
from trainer.methods.distancegan import DistanceGan, DistanceGanConfig, as_rows, pairs_of_own
from trainer.methods.parts.memory import RunningMoments
from trainer.methods.parts.sides import Translated

HALVES = "top-bottom"  # of the code


def self_distances_of_batches(batches: Tensor) -> Tensor:
    """(n,) of (n, B, C, H, W): the published distance is that of all images of a batch together."""
    return torch.stack([self_distances(batch, HALVES).mean() for batch in batches])


def pair_distances_of_batches(batches: Tensor) -> Tensor:
    """(n (n - 1) / 2,) of (n, B, C, H, W): the published statistics are those of pairs of batches."""
    slots = [as_rows(images) for images in batches.unbind(1)]
    of_pairs = torch.stack([pair_distances(rows, rows) for rows in slots]).mean(dim=0)
    one, other = torch.triu_indices(len(batches), len(batches), 1)
    return of_pairs[one, other]


def moments(recording: Recording, tag: str = "") -> dict[str, Tensor]:
    return {
        kind: torch.stack([recording[f"{tag}{kind}_{domain}"] for domain in "AB"]) for kind in ("expectation", "std")
    }


def assert_same_statistics(recording: Recording, kind: str, tag: str = "") -> None:
    measure = self_distances_of_batches if kind == "self" else pair_distances_of_batches
    stat, limit, most = tag.partition("max")  # the batches of another case, up to so many
    items = int(most.removesuffix("_")) if limit else None
    for domain in "AB":
        if f"{tag}expectation_{domain}" in recording:
            found = RunningMoments(1)
            found.add(measure(recording[f"{stat}stat_{domain}"][:items])[:, None])
            assert_same(found.mean, recording[f"{tag}expectation_{domain}"].reshape(1), 1e-9)
            assert_same(found.std, recording[f"{tag}std_{domain}"].reshape(1), 1e-9)


@each("distancegan_distance*.npz")
def test_statistics(recording: Recording) -> None:
    for tag in recording.before("expectation_A"):
        assert_same_statistics(recording, tag.split("_")[0], tag)


@each("distancegan_distance*.npz")
def test_losses_and_their_gradients(recording: Recording) -> None:
    for tag in recording.before("loss_A"):
        measured = f"{tag}expectation_A" in recording
        found = moments(recording, tag) if measured else {"expectation": torch.zeros(2), "std": torch.ones(2)}
        losses, fakes = {}, {}
        for letter, other in ("A", "B"), ("B", "A"):
            images, fake = recording[f"{tag}real_{letter}"], recording[f"{tag}fake_{other}"].requires_grad_()
            mean, std = (each if letter == "A" else each.flip(0) for each in found.values())
            fakes[other] = fake
            if tag.startswith("self"):
                before, after = (self_distances_of_batches(each[None]) for each in (images, fake))
                losses[letter] = distance_changes(before, after, mean, std).mean()
            else:
                before, after = (pairs_of_own(each, StepContext(Draws(0, 0)))[0] for each in (images, fake))
                value = distance_changes(before, after, mean, std).fill_diagonal_(0).sum() / (
                    len(fake) * (len(fake) - 1)
                )
                losses[letter] = 2 * value - value.detach()
            assert_same(losses[letter], recording[f"{tag}loss_{letter}"], 1e-9)
        for other, gradient in zip(
            "BA", torch.autograd.grad(losses["A"] + losses["B"], [fakes["B"], fakes["A"]]), strict=True
        ):
            assert_same(gradient, recording[f"{tag}grad_fake_{other}"], 1e-9)


# ---- whole steps ------------------------------------------------------------------------------------------------------

READ: dict[str, Callable[[str], dict[str, Any]]] = {
    "use_self_distance": lambda text: {"method.distances": "self", "method.halves": HALVES},
    "unnormalized_distances": lambda text: {"method.measured": 0},
    "lambda_distance_A": lambda text: {"method.distance_a": float(text)},
    "lambda_distance_B": lambda text: {"method.distance_b": float(text)},
}


def job(recording: Recording) -> Any:
    given = command_line(recording)
    defaults: dict[str, Any] = {
        "method.both": "A_to_B" not in given, "method.architecture": recording.plain("architecture"),
    }  # fmt: skip
    if "use_cycle_loss" in given:
        defaults |= {f"method.lambda_{side.lower()}": float(given.get(f"lambda_{side}", 10)) for side in "AB"}
    return job_of(recording, "distancegan", READ, defaults)


def names(method: DistanceGan) -> Published:
    networks: dict[str, nn.Module] = {}
    for side in method.sides:
        networks |= {f"G_{side.letter}": side.generator, f"D_{side.letter}": side.adversary.discriminator}
    pools = {pool: side.adversary for pool, side in zip("BA", method.sides, strict=False)}
    return Published(networks, pools, pictures, {"Cyc_A": "cycle_A", "Cyc_B": "cycle_B"})


def pictures(outputs: list[Translated], batch: Pair) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {f"fake_{pool}": made.fake for pool, made in zip("BA", outputs, strict=False)}
    return found | {f"rec_{letter}": made.cycle for letter, made in zip("AB", outputs, strict=False)}


@each("distancegan_trace_*.npz")
@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_training_steps(recording: Recording, memory_format: str) -> None:
    config = job(recording)

    def publish(method: DistanceGan) -> None:
        if config.method.measured:
            mean, std = moments(recording).values()
            method.statistics.count.fill_(1)
            method.statistics.total.copy_(mean)
            method.statistics.squares.copy_(std.square() + mean.square())
        of_images = method.self_distances
        method.self_distances = lambda images: of_images(images).mean(0, keepdim=True)  # type: ignore[method-assign]

    replay(recording, config, names, memory_format, publish)
    if config.method.measured:
        assert_same_statistics(recording, config.method.distances)


@each("distancegan_init_stats*.npz")
def test_initialisation(recording: Recording) -> None:
    method = DistanceGanConfig(architecture="distancegan").build(seed=0, global_batch=2)
    assert_same_initialisation(recording, names(method).networks)
