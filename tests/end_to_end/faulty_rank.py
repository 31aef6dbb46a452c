"""launch/train.py with something wrong with one of its two ranks: faulty_rank.py FAULT OPTION..."""

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from infra.errors import exits_cleanly
from launch.runs import lock, training
from launch.runs.config import parse_arguments
from launch.runs.recorder import Recorder
from launch.runs.translator import train
from trainer.loop import Trainer

RANK = int(os.environ["RANK"])
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def raises() -> None:
    record = Recorder.record

    def record_and_raise(self: Recorder, done: int, rows: Any) -> None:
        record(self, done, rows)
        if rows and rows[-1]["step"] == 3 and RANK == 1:
            raise ValueError("a shard in flames")

    Recorder.record = record_and_raise  # type: ignore[method-assign]


def hangs() -> None:
    do = Trainer._step

    def hang(self: Trainer, step: int, batches: Any) -> None:
        if step == 4 and RANK == 1:
            time.sleep(3600)
        do(self, step, batches)

    Trainer._step = hang  # type: ignore[method-assign]


def dies() -> None:
    """In the first attempt rank 0, in the second rank 1, each after a checkpoint of its own."""
    do = Trainer._step

    def die(self: Trainer, step: int, batches: Any) -> None:
        if ATTEMPT < 2 and RANK == ATTEMPT and step == (3, 7)[ATTEMPT]:
            os.kill(os.getpid(), signal.SIGKILL)
        do(self, step, batches)

    Trainer._step = die  # type: ignore[method-assign]


def on_a_node_of_its_own() -> None:
    """And slow from step 5 on in its first attempt, so that it can be met there."""
    socket.gethostname = lambda: f"node{RANK}"
    do, again = Trainer._step, Path("run").exists()

    def dawdle(self: Trainer, step: int, batches: Any) -> None:
        if step >= 4 and not again:
            time.sleep(5)
        do(self, step, batches)

    Trainer._step = dawdle  # type: ignore[method-assign]


def elsewhere() -> None:
    lock.SEEN_S = 1.0
    if RANK == 1:
        Path("elsewhere").mkdir()
        os.chdir("elsewhere")


def told() -> None:
    find = training.find_start

    def find_and_be_told(*given: Any) -> Any:
        if RANK == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return find(*given)

    training.find_start = find_and_be_told  # type: ignore[assignment]


@exits_cleanly
def main() -> None:
    fault, *options = [given for given in sys.argv[1:] if not given.startswith("--local_rank")]
    {each.__name__: each for each in (raises, hangs, dies, on_a_node_of_its_own, elsewhere, told)}[fault]()
    train(parse_arguments(options))


if __name__ == "__main__":
    main()
