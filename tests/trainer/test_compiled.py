"""Steps whose networks torch.compile takes against those that it does not."""

import functools
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.one_step import Step
from tests.trainer.small import method_config, small_method
from trainer.engines import faster
from trainer.engines.faster import use_compiler, use_triton
from trainer.methods import METHODS
from trainer.methods.cut import Cut
from trainer.networks import compiling
from trainer.networks.compiling import Compilable, keep_compiled
from trainer.networks.norm import InstanceNorm2d

pytestmark = pytest.mark.slow


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Networks are traced and differentiated as for inductor, whose code takes a C++ compiler and a minute to make. What is put
    in here takes its place."""
    chosen = ["aot_eager"]

    @functools.cache
    def compiled(function: Any) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=False, backend=chosen[0])

    monkeypatch.setattr(compiling, "_compiled", compiled)
    monkeypatch.setattr(compiling, "_refused", set())
    torch._dynamo.reset()
    return chosen


def short(switch: str, **options: Any) -> Step:
    """With one residual block, for the time that it takes."""
    step = Step(precision="fp32", compile=switch, options={"taps": (0, 4, 8, 12)}, **options)
    del step.method.generator.model[13:-11]
    return step


def test_compiled_steps_are_those_that_are_not(backend: list[str]) -> None:
    """In float64, over steps that change the weights: G's three passes, and D's with its weights and with these held constant."""
    torch._dynamo.utils.counters.clear()
    steps = {switch: short(switch, dtype=torch.float64, lr=1e-3) for switch in ("false", "true")}
    for number in range(3):
        expected, losses = (step.take(number) for step in steps.values())
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value.item(), rel=1e-8), (number, name)
        eager, gradients = (step.gradients() for step in steps.values())
        for name, gradient in eager.items():
            assert float((gradients[name] - gradient).norm() / gradient.norm()) < 1e-6, (number, name)
    assert not compiling._refused
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5


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
    """Of networks whose passes are marked. The generator's gradient of a gradient has no compiled form."""
    method = method_config(name).build(seed=0, global_batch=2)
    use_compiler(method, "true", torch.device("cpu"))
    marked = [part for part in method.modules() if isinstance(part, Compilable) and part.compiled]
    assert all(part in method.compiled_parts() for part in marked)
    assert bool(marked) == (name not in ("munit", "drit", "sincut"))


def test_the_lipschitz_penalty_is_compatible_with_compiling() -> None:
    """It needs the gradient of D's gradient, which compiled code has not: D stays as it is."""
    options = {"constraint__lipschitz": 10.0, "constraint__start": 0.0}
    method = method_config("srunit", **options).build(seed=0, global_batch=1)
    assert isinstance(method, Cut) and method.compiled_parts() == [method.generator]
