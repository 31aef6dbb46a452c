"""What ranks add up while the backward pass goes on, and what they tell each other without an accelerator."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from tests.end_to_end.jobs import LAUNCHERS
from tests.trainer import overlapped
from trainer.engines.ddp import DdpEngine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, int], dict[str, Any]]:
    script = Path(overlapped.__file__)
    variables = {"PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *LAUNCHERS["ddp"][1:], str(script)],
        env=os.environ | variables, text=True, capture_output=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(line["kind"], line["accumulation"]): line for line in lines}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["DdpEngine", "Meanwhile"])
def test_gradients_are_added_up_while_others_are_not_there_yet(
    kind: str, accumulation: int, found: dict[tuple[str, int], dict[str, Any]]
) -> None:
    """A dot is a gradient, R a bucket: once in a step, in the last micro-batch."""
    for optimiser, events in found[kind, accumulation]["events"].items():
        gradients = events.count(".") // accumulation
        before, last = events[: (accumulation - 1) * gradients], events[(accumulation - 1) * gradients :]
        assert "R" not in before, optimiser
        assert last.count("R") == 2 and 0 < last.index("R") < 0.6 * len(last), (optimiser, events)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_changes_no_number(accumulation: int, found: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert len({found[kind, accumulation]["weights"] for kind in ("DdpEngine", "DeepSpeedEngine", "Meanwhile")}) == 1


def test_what_happened_to_the_data_is_told_by_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NCCL, `None` would be the accelerators' group, whose messages wait for what these have to do."""
    groups: list[Any] = []
    monkeypatch.setattr(dist, "gather_object", lambda value, values, group=None: groups.append(group))
    engine: Any = SimpleNamespace(world_size=2, rank=0, _hosts="the hosts")
    assert DdpEngine.gather(engine, {}) == [None, None] and groups == ["the hosts"]
