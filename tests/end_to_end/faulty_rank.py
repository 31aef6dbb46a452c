"""launch/train.py with something wrong with rank 1: faulty_rank.py FAULT OPTION..."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from infra.errors import exits_cleanly
from launch.runs.config import parse_arguments
from launch.runs.recorder import Recorder
from launch.runs.translator import train
from trainer.loop import Trainer


@exits_cleanly
def main() -> None:
    fault, *options = [given for given in sys.argv[1:] if not given.startswith("--local_rank")]
    if os.environ["RANK"] == "1":
        record, do = Recorder.record, Trainer._step

        def record_and_raise(self: Recorder, rows: Any) -> None:
            record(self, rows)
            if rows and rows[-1]["step"] == 3:
                raise ValueError("a shard in flames")

        def hang(self: Trainer, step: int, batches: Any) -> None:
            if step == 4:
                time.sleep(3600)
            do(self, step, batches)

        if fault == "raises":
            Recorder.record = record_and_raise  # type: ignore[method-assign]
        if fault == "hangs":
            Trainer._step = hang  # type: ignore[method-assign]
        if fault == "elsewhere":
            Path("elsewhere").mkdir()
            os.chdir("elsewhere")
    train(parse_arguments(options))


if __name__ == "__main__":
    main()
