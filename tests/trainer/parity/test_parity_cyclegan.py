"""Replay of the published CycleGAN's training steps, in float64, and its initialisation."""

import pytest
from torch import Tensor

from tests.trainer.parity.recorded import Recording, each
from tests.trainer.parity.replay import Pair
from tests.trainer.parity.strided import Published, assert_same_initialisation, job_of, replay
from trainer.methods.cyclegan import CycleGan, CycleGanConfig
from trainer.methods.parts.sides import Translated

READ = {
    "lambda_A": lambda text: {"method.lambda_a": float(text)},
    "lambda_B": lambda text: {"method.lambda_b": float(text)},
    "lambda_identity": lambda text: {"method.identity": float(text)},
}


def names(method: CycleGan) -> Published:
    a, b = method.sides
    networks = {
        "G_A": a.generator, "G_B": b.generator, "D_A": a.adversary.discriminator, "D_B": b.adversary.discriminator,
    }  # fmt: skip
    return Published(networks, {"B": a.adversary, "A": b.adversary}, pictures)


def pictures(outputs: list[Translated], batch: Pair) -> dict[str, Tensor | None]:
    a, b = outputs
    return {
        "fake_B": a.fake, "fake_A": b.fake, "rec_A": a.cycle, "rec_B": b.cycle, "idt_A": a.identity,
        "idt_B": b.identity,
    }  # fmt: skip


@each("cyclegan_trace_*.npz")
@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_training_steps(recording: Recording, memory_format: str) -> None:
    replay(recording, job_of(recording, "cyclegan", READ, {"method.identity": 0.5}), names, memory_format)


@each("cyclegan_init_stats*.npz")
def test_initialisation(recording: Recording) -> None:
    assert_same_initialisation(recording, names(CycleGanConfig().build(seed=0, global_batch=1)).networks)
