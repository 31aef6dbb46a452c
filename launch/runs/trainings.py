"""Several trainings, each a process of its own, with one line of progress for all."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from infra.errors import UserError
from launch.runs.folder import RunFolder
from launch.runs.processes import run_all


@dataclass(frozen=True)
class Training:
    """command: a Python script with its arguments. run_dir: where it trains. steps: how many."""

    command: Sequence[object]
    run_dir: Path
    steps: int


def train_all(
    trainings: Mapping[str, Training], logs: Path, parallel: int, ended: Callable[[str], object] = lambda _: None
) -> None:
    """Do trainings by name, or go on with them, some at once; see `run_all`. ended: called with the name of each that ended
    well. UserError, when all others have ended, if one failed."""
    failed = dict[str, str]()
    progress = _Progress(list(trainings.values()))
    commands = {name: training.command for name, training in trainings.items()}
    with closing(progress), closing(run_all(commands, logs, parallel, progress.show)) as results:
        for name, why in results:
            if why is None:
                ended(name)
            else:
                failed[name] = why
    if failed:
        name, why = next((name, failed[name]) for name in trainings if name in failed)
        others = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise UserError(f"{name} failed{others}: {why}: run the same command again to continue")


class _Progress:
    """In steps."""

    def __init__(self, trainings: Sequence[Training]) -> None:
        self.folders = [RunFolder(training.run_dir) for training in trainings]
        interval = 1.0 if sys.stderr.isatty() else 60.0
        self.line = tqdm(
            desc=f"{len(trainings)} trainings", total=sum(training.steps for training in trainings), unit="step",
            initial=self._done(), mininterval=interval, maxinterval=interval, disable=not trainings, smoothing=0,
        )  # fmt: skip

    def show(self) -> None:
        self.line.update(self._done() - self.line.n)

    def _done(self) -> int:
        return sum(folder.steps_done() for folder in self.folders)

    def close(self) -> None:
        self.show()
        self.line.close()
