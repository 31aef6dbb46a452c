"""What a GPU computes against the same step in fp32 on a CPU."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.small import small_method
from trainer.draws import Draws
from trainer.engines import EngineConfig, make_engine
from trainer.methods.base import StepContext
from trainer.optim import OptimConfig
from trainer.step_graphs import steps_of

pytestmark = pytest.mark.gpu


@dataclass
class Pairs:
    source: Tensor
    target: Tensor
    slots: Tensor


def losses_of(steps: int, beta: float, **options: Any) -> list[dict[str, float]]:
    """The losses of so many steps on two pairs of 128x128, all with the published initialisation: nothing is learnt.
    options: of the engine."""
    engine = make_engine(EngineConfig(kind="single", **options))
    sizes: dict[str, Any] = {"generator__ngf": 16, "generator__blocks": 9, "discriminator__ndf": 16, "head_dim": 256}
    method = small_method(global_batch=2, robust__beta=beta, robust__start=0.0, **sizes)
    engine.prepare(method, OptimConfig(lr=1e-12))
    images = torch.rand(2, 2, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = Pairs(images[0].to(engine.device), images[1].to(engine.device), torch.arange(2))
    take = steps_of(method, engine)
    named = [take([batch], StepContext(Draws(0, step))) for step in range(steps)]
    return [{name: value.item() for name, value in losses.items()} for losses in named]


@pytest.mark.parametrize(
    ("precision", "memory_format", "tolerance"),
    [("fp32", "contiguous", 1e-3), ("fp32", "channels_last", 1e-3), ("bf16", "channels_last", 5e-2)],
)
def test_a_step_agrees_with_the_cpu(precision: str, memory_format: str, tolerance: float) -> None:
    # Without L_robust, whose perturbations a GPU draws with another generator.
    (expected,) = losses_of(1, 0.0, device="cpu", precision="fp32", memory_format="contiguous")
    (actual,) = losses_of(1, 0.0, device="cuda", precision=precision, memory_format=memory_format)
    assert actual == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(("compiled", "graphs"), [("true", False), ("true", True), ("false", True)])
@pytest.mark.parametrize(("precision", "beta", "tolerance"), [("fp32", 1e-4, 1e-3), ("bf16", 0.0, 5e-2)])
def test_compiled_and_captured_steps_agree_with_eager_ones(
    precision: str, beta: float, tolerance: float, compiled: str, graphs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    # A graph is warmed up, recorded and replayed in its first three steps.
    options = {"device": "cuda", "precision": precision, "tf32": False}
    expected = losses_of(5, beta, **options, compile="false")
    actual = losses_of(5, beta, **options, compile=compiled, graphs=graphs)
    for eager, faster in zip(expected, actual, strict=True):
        assert faster == pytest.approx(eager, rel=tolerance, abs=tolerance)
    assert not [record for record in caplog.records if "cannot be captured" in record.message]


def test_triton_kernels() -> None:
    pytest.importorskip("triton")
    from tests.trainer.check_norm_triton import check, check_flat_channels

    check("cuda")
    check_flat_channels("cuda")


def test_the_robustness_term_runs_in_bf16() -> None:
    (losses,) = losses_of(1, 1e-4, device="cuda", precision="bf16")
    assert 0 < losses["robust"] < 1e4
