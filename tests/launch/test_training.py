"""What a training says of itself when it starts."""

from types import SimpleNamespace
from typing import Any

import pytest

from launch.runs.config import make_config
from launch.runs.training import losses_not_reached
from trainer.optim import OptimConfig
from trainer.schedule import Schedule

TINY = {"method.generator.ngf": 2, "method.generator.blocks": 6, "method.discriminator.ndf": 2, "method.head_dim": 2}


def said(steps: int, *layers: dict[str, Any]) -> list[str]:
    """Of a run of 100 images, 10 epochs and so many steps."""
    trainer: Any = SimpleNamespace(
        method=make_config(TINY, *layers).method.build(seed=0, global_batch=1),
        schedule=Schedule(OptimConfig(epochs=5, decay_epochs=5), 100),
        total_steps=steps,
    )
    return losses_not_reached(trainer)


def test_a_run_that_ends_before_its_loss_begins_says_so() -> None:
    (words,) = said(250)
    assert words.startswith(
        "this run ends after step 250, before the loss of method.robust.start = 0.25 begins (step 251)"
    )
    assert not said(251)


@pytest.mark.parametrize(
    "options",
    [{"method.name": "cut"}, {"method.robust.beta": 0.0}, {"method.robust.start": 0.0}, {"method.name": "fastcut"}],
)
def test_a_run_without_such_a_loss_or_with_it_from_the_start_says_nothing(options: dict[str, Any]) -> None:
    assert not said(1, options)


def test_the_losses_that_srunit_is_compared_with_begin_late_too() -> None:
    (words,) = said(10, {"method.robust.beta": 0.0, "method.constraint.smoothness": 1.0})
    assert "before the loss of method.constraint.start = 0.25 begins (step 251)" in words
