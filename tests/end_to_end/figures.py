"""How long the ends of a small training of two ranks take: python -m tests.end_to_end.figures, some minutes on a machine that
does nothing else. Prints the least and the greatest of each figure of docs/operations.md."""

import signal
import tempfile
import time
from pathlib import Path
from subprocess import Popen

import psutil

from infra.json_lines import read_records
from tests.end_to_end.jobs import kill, small_data, start, wait_for_step

REPEATS = 5
OPTIONS = [
    "--max-steps",
    "100000",
    "--optim.epochs",
    "100000",
    "--loop.samples-every",
    "100000",
    "--loop.keep-logged",
    "0",
]


class Measured:
    """A training in a folder of its own, and what was measured of it, in seconds, by name."""

    def __init__(self, data: str, folder: Path) -> None:
        self.data, self.folder = data, folder
        self.found: dict[str, list[float]] = {}

    def begin(self) -> tuple[Popen[str], list[psutil.Process]]:
        """Start it, or let it go on, until three steps are made; gives the launcher and the ranks."""
        metrics, began = self.folder / "run" / "metrics.jsonl", time.monotonic()
        done = max((row["step"] for row in read_records(metrics)), default=0)
        job = start("ddp", "--data", self.data, "--run-dir", "run", *OPTIONS, cwd=self.folder)
        wait_for_step(job, self.folder / "run", done + 1)
        self.add("from the command to the first step", time.monotonic() - began)
        wait_for_step(job, self.folder / "run", done + 30)
        ranks = [each for each in psutil.Process(job.pid).children(recursive=True) if "RANK" in each.environ()]
        return job, sorted(ranks, key=lambda each: each.environ()["RANK"])

    def end(self, name: str, number: int, told: psutil.Process | Popen[str], job: Popen[str]) -> None:
        began = time.monotonic()
        told.send_signal(number)
        job.communicate(timeout=300)
        self.add(name, time.monotonic() - began)

    def add(self, name: str, seconds: float) -> None:
        self.found.setdefault(name, []).append(seconds)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        measured = Measured(small_data(f"{place}/data"), Path(place))
        for _ in range(REPEATS):
            job, ranks = measured.begin()
            try:
                measured.end("from SIGTERM to the launcher to its end", signal.SIGTERM, job, job)
                job, ranks = measured.begin()
                measured.end("from a rank's death to the launcher's end", signal.SIGKILL, ranks[1], job)
            finally:
                if job.poll() is None:
                    kill(job)
        for row in read_records(Path(place, "run", "metrics.jsonl")):
            for name in ("save/pause", "save/write"):
                if name in row:
                    measured.add(name, row[name])
    print(f"{psutil.cpu_count()} cores, load {psutil.getloadavg()[0]:.1f}; seconds:")
    for name, values in measured.found.items():
        print(f"{name}: {min(values):.3g} to {max(values):.3g} ({len(values)} times)")


if __name__ == "__main__":
    main()
