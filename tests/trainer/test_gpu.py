"""What a GPU computes against the same step in fp32 on a CPU."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from trainer.draws import Draws
from trainer.engines import EngineConfig, make_engine
from trainer.methods import Cut, CutConfig
from trainer.methods.base import StepContext
from trainer.methods.config import RobustConfig
from trainer.networks.config import ModelConfig
from trainer.optim import OptimConfig
from trainer.step import train_step

pytestmark = pytest.mark.gpu


@dataclass
class Pairs:
    source: Tensor
    target: Tensor
    slots: Tensor


def first_losses(device: str, precision: str, memory_format: str, beta: float) -> dict[str, float]:
    """The losses of one step from the published initialisation, on two pairs of 128x128."""
    engine = make_engine(EngineConfig(kind="single", device=device, precision=precision, memory_format=memory_format))
    config = CutConfig(robust=RobustConfig(beta=beta, start=0.0))
    method = Cut(config, ModelConfig(ngf=16, ndf=16), seed=0, global_batch=2)
    engine.prepare(method, OptimConfig())
    images = torch.rand(2, 2, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = Pairs(images[0].to(engine.device), images[1].to(engine.device), torch.arange(2))
    return {name: value.item() for name, value in train_step(method, engine, [batch], StepContext(Draws(0, 0))).items()}


@pytest.mark.parametrize(
    ("precision", "memory_format", "tolerance"),
    [("fp32", "contiguous", 1e-3), ("fp32", "channels_last", 1e-3), ("bf16", "channels_last", 5e-2)],
)
def test_a_step_agrees_with_the_cpu(precision: str, memory_format: str, tolerance: float) -> None:
    # Without L_robust, whose perturbations a GPU draws with another generator.
    expected = first_losses("cpu", "fp32", "contiguous", beta=0.0)
    actual = first_losses("cuda", precision, memory_format, beta=0.0)
    assert actual == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_triton_kernels() -> None:
    pytest.importorskip("triton")
    from tests.trainer.check_norm_triton import check

    check("cuda")


def test_the_robustness_term_runs_in_bf16() -> None:
    assert 0 < first_losses("cuda", "bf16", "channels_last", beta=1e-4)["robust"] < 1e4
