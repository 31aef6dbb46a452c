"""The folder of a search.

search.yaml     what was asked for, with everything filled in
made_of.json    hashes of the data, and of what evaluates
trials/0003/    run folder of a trial (launch/runs/folder.py)
trials.csv      all trials as a table
best.yaml       options of the best trial, for launch/train.py --config
landscape.png   the metric searched for over the options
ablations.md    instead of the two before, with --ablations
ray/            what Ray Tune continues from
mlflow_run_id   the MLflow run that the trials' runs belong to
"""

from pathlib import Path

from filelock import FileLock


class SearchFolder:
    def __init__(self, path: Path) -> None:
        self.path = path.absolute()  # Ray's workers have working folders of their own
        self.request_file = self.path / "search.yaml"
        self.made_of_file = self.path / "made_of.json"
        self.trials = self.path / "trials"
        self.csv_file = self.path / "trials.csv"
        self.best_file = self.path / "best.yaml"
        self.landscape_file = self.path / "landscape.png"
        self.ablations_file = self.path / "ablations.md"
        self.log_file = self.path / "search.log"
        self.run_id_file = self.path / "mlflow_run_id"
        self.ray = self.path / "ray"
        self.ray_experiment = self.ray / "tune"

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
