"""Steps whose networks torch.compile takes against those that it does not."""

import functools
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.one_step import Step
from tests.trainer.small import BATCHES, crop_of, method_config, small_method
from trainer.draws import Draws
from trainer.engines import EngineConfig, faster, make_engine
from trainer.engines.faster import use_compiler, use_triton
from trainer.methods import METHODS
from trainer.methods.base import Losses, StepContext
from trainer.methods.cut import Cut
from trainer.networks import compiling
from trainer.networks.compiling import Compilable, keep_compiled
from trainer.networks.generator import ResnetBlock
from trainer.networks.norm import InstanceNorm2d
from trainer.optim import OptimConfig
from trainer.step import train_step

pytestmark = pytest.mark.slow


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Networks are traced, differentiated and parted into forward and backward as for inductor, whose code takes a C++ compiler
    and a minute to make. What is put in here takes its place."""
    chosen = ["aot_eager_decomp_partition"]

    @functools.cache
    def compiled(function: Any) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=False, backend=chosen[0])

    monkeypatch.setattr(compiling, "_compiled", compiled)
    monkeypatch.setattr(compiling, "_refused", set())
    torch._dynamo.reset()
    return chosen


# Name -> a method, its options, and how many variants its passes have together: by shapes, taps, and what takes gradients.
Variants = dict[str, tuple[str, dict[str, Any], int]]
CUT: dict[str, Any] = {"taps": (0, 4, 8, 12), "patches": 16}
ROBUST: dict[str, Any] = CUT | {"robust__start": 0.0, "robust__beta": 0.01, "robust__least": 0.05}
DIFFERENTIATED: Variants = {
    "SRUNIT": ("srunit", ROBUST, 5),
    "CycleGAN": ("cyclegan", {"identity": 0.5}, 4),
    "DistanceGAN": ("distancegan", {"both": True, "measured": 0}, 3),
    "MUNIT": ("munit", {"discriminator__scales": 2}, 8),
    "DRIT, spectral norm": (
        "drit", {"every": 2, "discriminator__scales": 2, "discriminator__spectral_norm": True}, 11
    ),
}  # fmt: skip
# Of passes like these, so that to trace them is enough, which takes half the time.
TRACED: Variants = {
    "CUT": ("cut", CUT, 4),
    "FastCUT with its identity": ("fastcut", CUT | {"identity": True}, 5),
    "SRUNIT released, one of two taps": ("srunit-released", CUT | {"taps": (4, 8), "robust__start": 0.0}, 6),
    "GcGAN": ("gcgan", {"generators": "cross"}, 3),
    "SRC": ("src", CUT | {"flip_equivariance": True}, 5),
    "SemST": ("semst", CUT, 8),
    "DRIT by features": (
        "drit", {"every": 1, "generator__attributes": "feature-wise", "discriminator__scales": 1}, 13
    ),
}  # fmt: skip
VARIANTS = DIFFERENTIATED | TRACED


class Steps:
    """On two pairs (DRIT: four), in float64, with one residual block where there are several, for the time that they take, and
    weights large enough that every path matters."""

    def __init__(self, name: str, options: dict[str, Any], switch: str) -> None:
        images, side = BATCHES.get(name, 2), crop_of(name)
        self.engine = make_engine(EngineConfig(kind="single", device="cpu", precision="fp32", compile=switch))
        self.method = small_method(name, global_batch=images, **options).double()
        for chain in self.method.modules():
            if isinstance(chain, nn.Sequential):
                for number in reversed([at for at, layer in enumerate(chain) if isinstance(layer, ResnetBlock)][1:]):
                    del chain[number]
        if name not in ("munit", "drit"):  # whose weights are larger from the start
            for parameter in self.method.parameters():
                parameter.data = parameter.data * 20 if parameter.ndim > 1 else parameter.data + 0.1
        self.engine.prepare(self.method, OptimConfig(lr=1e-3))
        drawn = torch.rand(2, images, side, side, 3, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
        source, target = drawn.permute(0, 1, 4, 2, 3)
        boxes = torch.tensor([[0, 4], [8, 0]]).repeat(images // 2, 1)
        self.batch = SimpleNamespace(
            source=source, target=target, slots=torch.arange(images), source_boxes=boxes, target_boxes=boxes
        )

    def take(self, number: int) -> Losses:
        return train_step(self.method, self.engine, [self.batch], StepContext(Draws(0, number), progress=0.9))

    def gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in self.method.named_parameters()
                if name.endswith("weight") and parameter.grad is not None}  # fmt: skip


def test_every_method_is_compiled_here_but_sincut() -> None:
    assert {name for name, _, _ in VARIANTS.values()} | {"sincut"} == set(METHODS)


@pytest.mark.parametrize("case", VARIANTS)
def test_compiled_steps_are_those_that_are_not(case: str, backend: list[str]) -> None:
    """Over steps that change the weights, with no more variants than stated."""
    name, options, stated = VARIANTS[case]
    if case not in DIFFERENTIATED:
        backend[0] = "eager"
    torch._dynamo.utils.counters.clear()
    steps = {switch: Steps(name, options, switch) for switch in ("false", "true")}
    for number in range(3):
        expected, losses = (each.take(number) for each in steps.values())
        for loss, value in expected.items():
            assert losses[loss].item() == pytest.approx(value.item(), rel=1e-8), (number, loss)
        eager, gradients = (each.gradients() for each in steps.values())
        for weight, gradient in eager.items():
            assert float((gradients[weight] - gradient).norm()) <= 1e-6 * float(gradient.norm()), (number, weight)
    assert not compiling._refused
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == stated < compiling.VARIANTS


def short(switch: str) -> Step:
    """With one residual block, for the time that it takes."""
    step = Step(precision="fp32", compile=switch, options={"taps": (0, 4, 8, 12)})
    del step.method.generator.model[13:-11]
    return step


def test_what_cannot_be_compiled_runs_as_it_is_with_one_warning(
    backend: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler")

    backend[0] = refuse  # type: ignore[call-overload]
    with caplog.at_level(logging.WARNING, logger=compiling.__name__):
        losses = short("true").take()
    expected = short("false").take()
    assert {name: float(value) for name, value in losses.items()} == {
        name: float(value) for name, value in expected.items()
    }
    (record,) = caplog.records
    assert "no compiler" in record.getMessage() and "--engine.compile false" in record.getMessage()


@pytest.mark.parametrize(
    ("device", "triton", "on"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_auto_is_a_gpu_with_triton(device: str, triton: bool, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network has to be on the device for that."""
    monkeypatch.setattr(faster, "has_triton", lambda: triton)
    monkeypatch.setattr(faster, "_refusal", lambda device: "")
    method: Cut = small_method("cut")
    use_compiler(method, "auto", torch.device(device))
    use_triton(method, "auto", torch.device(device))
    assert [network.compiled for network in (method.generator, method.discriminator)] == [on, on]
    assert {norm.triton for norm in method.modules() if isinstance(norm, InstanceNorm2d)} == {on}


def test_where_triton_does_not_work_auto_leaves_the_norms_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(faster, "has_triton", lambda: True)
    monkeypatch.setattr(faster, "_refusal", lambda device: "no driver")
    method = small_method("cut")
    with caplog.at_level(logging.WARNING, logger=faster.__name__):
        use_triton(method, "auto", torch.device("cuda"))
    assert not any(norm.triton for norm in method.modules() if isinstance(norm, InstanceNorm2d))
    (record,) = caplog.records
    assert "no driver" in record.getMessage()


@pytest.mark.parametrize("given", [{}, {"TORCHINDUCTOR_CACHE_DIR": "mine"}])
def test_what_is_compiled_is_kept_beside_the_runs(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or where the environment says."""
    monkeypatch.setattr(os, "environ", dict(given))
    keep_compiled(tmp_path)
    assert os.environ == {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / ".compiled")} | given


@pytest.mark.parametrize("name", METHODS)
def test_auto_compiles_whole_passes_alone(name: str) -> None:
    """Of networks whose passes are marked, which SinCUT's are not: R1 takes the gradient of D's gradient."""
    method = method_config(name).build(seed=0, global_batch=2)
    use_compiler(method, "true", torch.device("cpu"))
    marked = [part for part in method.modules() if isinstance(part, Compilable) and part.compiled]
    assert all(part in method.compiled_parts() for part in marked)
    assert bool(marked) == (name != "sincut")


def test_the_lipschitz_penalty_is_compatible_with_compiling() -> None:
    """It needs the gradient of D's gradient, which compiled code has not: D stays as it is."""
    options = {"constraint__lipschitz": 10.0, "constraint__start": 0.0}
    method = method_config("srunit", **options).build(seed=0, global_batch=1)
    assert isinstance(method, Cut) and method.compiled_parts() == [method.generator]
