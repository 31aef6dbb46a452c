"""What an engine keeps beside weights and optimisers."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from tests.trainer.small import small_method
from tests.trainer.test_methods import Pairs, at
from trainer.checkpoint import Checkpoint
from trainer.checkpointer import Checkpointer
from trainer.engines import Engine, EngineConfig, shared_memory
from trainer.optim import OptimConfig
from trainer.state import collect_state, restore_state
from trainer.step import train_step

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]


def in_fp16() -> tuple[Any, Engine]:
    method = small_method(patches=16)
    engine = Engine(EngineConfig(device="cpu", precision="fp16"))
    engine.prepare(method, OptimConfig())
    return method, engine


def test_the_loss_scale_goes_through_a_checkpoint(tmp_path: Path) -> None:
    method, engine = in_fp16()
    fresh = engine.scaler_state()
    images = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for step in range(3):
        train_step(method, engine, [Pairs(images[0], images[1], torch.tensor([0]))], at(step))
    state, reached = collect_state(method, engine, None, 3), engine.scaler_state()
    assert all(reached[spec.name] != fresh[spec.name] for spec in method.optimisers)
    path = Checkpointer(tmp_path, keep=1).save(3, state.tensors, {"step": 3, "scalers": state.scalers})
    later_method, later = in_fp16()
    restore_state(later_method, later, None, Checkpoint(path))
    assert later.scaler_state() == reached


CLOSE = """
import os
import sys
from pathlib import Path
import torch
from tests.trainer.small import small_method
from trainer.engines import EngineConfig
from trainer.engines.ddp import DdpEngine
from trainer.optim import OptimConfig

def threads():
    return [int(task.name) for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text().startswith("pt_gloo")]

engine = DdpEngine(EngineConfig(device="cpu"))
engine.prepare(small_method(patches=16), OptimConfig())
processor = {min(os.sched_getaffinity(0))}
os.sched_setaffinity(0, processor)
for thread in threads():
    os.sched_setaffinity(thread, processor)
    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
sys.setswitchinterval(1e6)
engine.mean(torch.ones(1))
engine.close()
print("closed" if threads() else "closed too early", flush=True)
engine.modules.clear()
print("ended" if not threads() else "its threads are left", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="holds a thread up by Linux's scheduler")
def test_an_engine_ends_while_the_thread_of_its_group_puts_the_last_message_away() -> None:
    """The thread runs only when the main thread waits here, as may happen to anyone for a moment."""
    done = subprocess.run([sys.executable, "-c", CLOSE], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.stdout == "closed\nended\n", done.stderr


LOAD = """
from trainer.engines import shared_memory
print(shared_memory.build() or "loaded", flush=True)
"""


def test_a_process_killed_while_it_loads_the_extension_keeps_no_later_one_waiting() -> None:
    """What it leaves is torch's lock file. Two start at once, as the ranks of a job do."""
    place = shared_memory.folder()
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "turn"):
        (place / "lock").touch()
    jobs = [
        subprocess.Popen([sys.executable, "-c", LOAD], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
                         env=os.environ | {"DS_ACCELERATOR": "cpu"})
        for _ in range(2)
    ]  # fmt: skip
    try:
        assert all("loaded" in job.communicate(timeout=200)[0] for job in jobs)
    finally:
        for job in jobs:
            job.kill()
