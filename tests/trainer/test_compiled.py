"""Steps whose networks torch.compile takes against those that it does not."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer.one_step import Step
from trainer.methods import Cut

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as for inductor, whose code takes a C++ compiler and a minute to make. What cannot be traced
    as a whole is an error."""
    compiled = nn.Module.compile
    whole: dict[str, Any] = {"backend": "aot_eager", "fullgraph": True}
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled(self, **options, **whole))


def test_compiling_changes_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, over steps that change the weights: D is used as it is and with its weights held constant."""
    monkeypatch.setattr(Cut, "compiled_parts", lambda self: [self.generator.model[12], self.discriminator])
    steps = {
        compile: Step(dtype=torch.float64, precision="fp32", compile=compile, lr=1e-3) for compile in (False, True)
    }
    assert all(part._compiled_call_impl is not None for part in steps[True].method.compiled_parts())
    for number in range(3):
        expected, losses = (step.take(number) for step in steps.values())
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value.item(), rel=1e-8), (number, name)
        eager, gradients = (step.gradients() for step in steps.values())
        for name, gradient in eager.items():
            assert float((gradients[name] - gradient).norm() / gradient.norm()) < 1e-6, (number, name)


def test_the_lipschitz_penalty_is_compatible_with_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs the gradient of D's gradient, which compiled code has not: D stays as it is."""
    parts = Cut.compiled_parts
    monkeypatch.setattr(Cut, "compiled_parts", lambda self: parts(self)[-1:])  # for the time that it takes
    options = {"constraint__lipschitz": 10.0, "constraint__start": 0.0}
    expected = Step(precision="fp32", options=options).take()
    losses = Step(precision="fp32", options=options, compile=True).take()
    assert losses["lipschitz"].item() == pytest.approx(expected["lipschitz"].item(), rel=1e-4)
    assert losses["D_real"].item() == pytest.approx(expected["D_real"].item(), rel=1e-4)
