"""The folder of a search, which is its whole memory: Ray keeps nothing that a restart would need.

search.yaml        what was asked for, with everything filled in
trials/0003/       run folder of a trial (launch/runs/folder.py)
trials/0003.json   the trial's record
trials.csv         all records as a table
best.yaml          options of the best trial, for launch/train.py --config
landscape.png      the figure searched for over the options
ablations.md       instead of the two before, with --ablations
mlflow_run_id      the MLflow run that the trials' runs belong to
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from infra.storage import replacing

Status = Literal["running", "finished", "stopped", "failed"]  # stopped: by the scheduler, which preferred others


@dataclass
class Record:
    """params: by dotted name. figures: of the last evaluation. cause: of a failure. node: where it ran last."""

    number: int
    params: dict[str, Any]
    status: Status = "running"
    cause: str = ""
    step: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    node: str = ""


class SearchFolder:
    def __init__(self, path: Path) -> None:
        self.path = path.absolute()  # Ray's workers have working folders of their own
        self.request_file = self.path / "search.yaml"
        self.trials = self.path / "trials"
        self.csv_file = self.path / "trials.csv"
        self.best_file = self.path / "best.yaml"
        self.landscape_file = self.path / "landscape.png"
        self.ablations_file = self.path / "ablations.md"
        self.log_file = self.path / "search.log"
        self.run_id_file = self.path / "mlflow_run_id"
        self.ray = self.path / "ray"  # Ray's own notes, of no use afterwards

    @classmethod
    def named(cls, name: str) -> "SearchFolder":
        return cls(Path("runs") / f"search-{name}")

    @property
    def name(self) -> str:
        return self.path.name.removeprefix("search-")

    def run_dir(self, number: int) -> Path:
        return self.trials / f"{number:04}"

    def lock(self, number: int | None = None) -> FileLock:
        """Held by who runs a trial, or the search: one that was killed holds nothing."""
        return FileLock(self.path / "lock" if number is None else self.trials / f"{number:04}.lock")

    def write(self, record: Record) -> None:
        with replacing(self.trials / f"{record.number:04}.json") as file:
            file.write((json.dumps(asdict(record), indent=1) + "\n").encode())

    def records(self) -> list[Record]:
        """Of all trials begun, by number."""
        return [_record(json.loads(path.read_text())) for path in sorted(self.trials.glob("*.json"))]


def _record(fields: dict[str, Any]) -> Record:
    # JSON has no tuples; the configuration tree has no lists.
    params = {name: tuple(value) if isinstance(value, list) else value for name, value in fields["params"].items()}
    return Record(**fields | {"params": params})
