"""Replay of whole training steps of the published CUT, FastCUT and SRUNIT, in float64."""

import pytest

from tests.trainer.parity.published_passes import publish, stock_norm_is_wrong, unmend
from tests.trainer.parity.recorded import Recording, each
from tests.trainer.parity.replay import replay

TRACES = "trace_[!i]*.npz"  # all but trace_init


def trains_g(recording: Recording) -> bool:
    """False for steps of the published SRUNIT with L_robust off, which update D alone: a fault that is not copied."""
    return recording.plain("maxchange_G") != 0


def has_right_gradients(recording: Recording) -> bool:
    """At batch size 1 the published steps met a fault of torch's instance norm (published_passes.py)."""
    return trains_g(recording) and recording["real_A"].shape[1] > 1


@each(TRACES, has_right_gradients)
@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_training_steps(recording: Recording, memory_format: str) -> None:
    replay(recording, memory_format)


@each(TRACES, trains_g)
def test_training_steps_in_the_published_passes(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (has_right_gradients(recording) or stock_norm_is_wrong()):
        pytest.skip("recorded with a fault of torch 2.13's instance norm that this torch does not have")
    unmend(monkeypatch)
    replay(recording, "contiguous", publish)  # as the recordings have it, since the fault depends on it
