"""Trains every method for a few steps, on however many ranks it is started with:

    torchrun --nproc_per_node 2 tests/end_to_end/every_method.py DATA OUT ACCUMULATION HOW METHOD...

leaves OUT/METHOD/metrics.jsonl and checkpoints. HOW: whole; stopped, in the middle, and continued; or killed (one process
alone): by SIGKILL, a step after its checkpoint, and continued by a new process. One process for all methods, or copies of it,
since starting one takes longer than a training.
"""

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from launch.runs import training, translator
from launch.runs.config import JobConfig, make_config
from launch.runs.recorder import Recorder
from tests.trainer.small import BATCHES, IN_USE, SMALL, crop_of
from trainer.engines import ddp
from trainer.engines import deepspeed as deepspeed_engine
from trainer.methods.parts import semantic

STEPS, STOP = 5, 3
# Of CUT, with the segmenter in DATA/segmenter. No mask: where two classes are as likely, rounding decides whether a pixel is
# shown, and batches of other sizes round otherwise (tests/trainer/test_semantic.py compares ranks in float64).
SEMANTIC = {"weight": 1.0, "labels": "true", "balance": 4.0}


def config(method: str, data: str, out: Path, accumulation: int, steps: int) -> JobConfig:
    options = {f"method.{name}": value for name, value in (SMALL[method] | IN_USE[method]).items()}
    if method == "cut":
        options |= {f"method.semantic.{name}": value for name, value in SEMANTIC.items()}
        options["method.semantic.segmenter"] = f"{data}/segmenter"
    batch = BATCHES.get(method, 2)
    run: dict[str, Any] = {
        "method.name": method, "data.root": data, "data.crop": crop_of(method), "run_dir": str(out / method),
        "loop.max_steps": steps, "loop.checkpoint_every": STOP,
        "loop.report_every": 1, "loop.samples": 1, "loop.keep_logged": 0, "loop.keep": 5,
        "optim.global_batch": batch,
        "optim.accumulation": accumulation, "optim.ema": 0.9, "optim.epochs": batch / 2, "optim.decay_epochs": batch / 2,
        "engine.precision": "fp32",
    }  # fmt: skip
    return make_config(options, run)


def in_a_process_of_its_own(work: Callable[[], object]) -> int:
    """The status that it ends with, as `os.waitpid` gives it."""
    if pid := os.fork():
        return os.waitpid(pid, 0)[1]
    work()
    os._exit(0)


def killed(train: Callable[[], object]) -> None:
    record = Recorder.record

    def record_and_die(self: Recorder, done: int, rows: Any) -> None:
        record(self, done, rows)
        if rows and rows[-1]["step"] > STOP:
            os.kill(os.getpid(), signal.SIGKILL)

    Recorder.record = record_and_die  # type: ignore[method-assign]
    train()


def main() -> None:
    # The deepspeed launcher adds --local_rank.
    data, out, accumulation, how, *methods = [given for given in sys.argv[1:] if not given.startswith("--")]
    without: Any = SimpleNamespace(finish=lambda: None)
    training.Follower = lambda folder: without  # type: ignore[assignment,misc]
    translator.save_pyfunc_model = lambda folder, *_: folder.mkdir(exist_ok=True)
    semantic.MEASURED = 6  # pairs
    for engine in (ddp.DdpEngine, deepspeed_engine.DeepSpeedEngine):
        engine.close = lambda self: None  # type: ignore[method-assign]  # the ranks stay connected from one to the next
    for method in methods:
        stopped, whole = (
            partial(translator.train, config(method, data, Path(out), int(accumulation), steps))
            for steps in (STOP, STEPS)
        )
        if how == "killed":
            assert in_a_process_of_its_own(partial(killed, whole)) == signal.SIGKILL, method
            assert in_a_process_of_its_own(whole) == 0, method
            continue
        if how == "stopped":
            stopped()
        whole()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
