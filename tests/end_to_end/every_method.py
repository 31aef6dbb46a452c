"""Trains every method for a few steps, stopped in the middle and continued, on however many ranks it is started with:

    torchrun --nproc_per_node 2 tests/end_to_end/every_method.py DATA OUT ACCUMULATION METHOD...

leaves OUT/METHOD/metrics.jsonl and checkpoints. One process for all of them, since starting one takes longer than a training.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from launch.runs import training, translator
from launch.runs.config import JobConfig, make_config
from tests.trainer.small import BATCHES, IN_USE, SMALL, crop_of
from trainer.engines import ddp
from trainer.engines import deepspeed as deepspeed_engine

STEPS, STOP = 5, 3


def config(method: str, data: str, out: Path, accumulation: int, steps: int) -> JobConfig:
    options = {f"method.{name}": value for name, value in (SMALL[method] | IN_USE[method]).items()}
    batch = BATCHES.get(method, 2)
    run: dict[str, Any] = {
        "method.name": method, "data.root": data, "data.crop": crop_of(method), "run_dir": str(out / method),
        "loop.max_steps": steps,
        "loop.report_every": 1, "loop.samples": 1, "loop.keep_logged": 0, "loop.keep": 5,
        "optim.global_batch": batch,
        "optim.accumulation": accumulation, "optim.ema": 0.9, "optim.epochs": batch / 2, "optim.decay_epochs": batch / 2,
        "engine.precision": "fp32",
    }  # fmt: skip
    return make_config(options, run)


def main() -> None:
    # The deepspeed launcher adds --local_rank.
    data, out, accumulation, *methods = [given for given in sys.argv[1:] if not given.startswith("--")]
    without: Any = SimpleNamespace(finish=lambda: None)
    training.Follower = lambda folder: without  # type: ignore[assignment,misc]
    translator.save_pyfunc_model = lambda folder, *_: folder.mkdir(exist_ok=True)
    for engine in (ddp.DdpEngine, deepspeed_engine.DeepSpeedEngine):
        engine.close = lambda self: None  # type: ignore[method-assign]  # the ranks stay connected from one to the next
    for method in methods:
        for steps in (STEPS,) if os.environ.get("EVERY_METHOD_WHOLE") else (STOP, STEPS):
            translator.train(config(method, data, Path(out), int(accumulation), steps))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
