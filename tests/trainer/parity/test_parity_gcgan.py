"""Replay of the published GcGAN's training steps, in float64, and its initialisation."""

from typing import Any

import pytest
from torch import Tensor, nn

from launch.runs.config import JobConfig
from tests.trainer.parity.recorded import Recording, each
from tests.trainer.parity.replay import Pair, command_line
from tests.trainer.parity.strided import Published, assert_same_initialisation, job_of, replay
from trainer.methods.gcgan import GcGan, GcGanConfig
from trainer.methods.parts.sides import Translated

GEOMETRIES = {"rot": "rot90", "vf": "vflip"}


def job(recording: Recording) -> JobConfig:
    given = command_line(recording)
    lambda_ab, lambda_gc, identity = (
        float(given.get(name, default)) for name, default in (("lambda_AB", 10), ("lambda_gc", 2), ("identity", 0.5))
    )
    options: dict[str, Any] = {
        "method.generators": given["model"].removeprefix("gc_gan_"),
        "method.geometry": GEOMETRIES[given.get("geometry", "rot")],
        "method.lambda_gan": float(given.get("lambda_G", 1)),
        "method.lambda_geometry": lambda_ab * lambda_gc, "method.lambda_identity": lambda_ab * identity,
    }  # fmt: skip
    return job_of(recording, "gcgan", {}, options)


def names(method: GcGan) -> Published:
    plain, turned = method.adversaries
    networks: dict[str, nn.Module] = {
        "G_AB": method.generators[0], "D_B": plain.discriminator, "D_gc_B": turned.discriminator,
    }  # fmt: skip
    if method.generators[1] is not method.generators[0]:
        networks["G_gc_AB"] = method.generators[1]

    def pictures(outputs: list[Translated], batch: Pair) -> dict[str, Tensor | None]:
        return {
            "fake_B": outputs[0].fake, "fake_gc_B": outputs[1].fake, "idt": outputs[0].identity,
            "idt_gc": outputs[1].identity, "real_gc_A": method.f(batch.source), "real_gc_B": method.f(batch.target),
        }  # fmt: skip

    return Published(networks, {"B": plain, "gc_B": turned}, pictures)


@each("gcgan_trace_*.npz")
@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_training_steps(recording: Recording, memory_format: str) -> None:
    replay(recording, job(recording), names, memory_format)


@each("gcgan_init_stats*.npz")
def test_initialisation(recording: Recording) -> None:
    assert_same_initialisation(recording, names(GcGanConfig().build(seed=0, global_batch=1)).networks)
