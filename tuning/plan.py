"""Which trials there are, for Ray Tune: those that a killed search left unfinished first, then new ones."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ray import cloudpickle
from ray.tune.experiment import Trial
from ray.tune.search import SearchAlgorithm

from trainer.evaluation.config import BETTER
from tuning.folder import Record, SearchFolder
from tuning.results import shown
from tuning.trial import cause_of

log = logging.getLogger(__name__)

RETRIES = 2  # of a trial whose process died; what it raises itself is not tried again
Propose = Callable[[int, list[Record]], dict[str, Any]]


class Plan(SearchAlgorithm):
    """Ray's searchers number trials by chance and remember in files of their own. Here a trial's id is its number, and
    every record is in the search's folder before the trial runs, so that no kill makes one lost or twice.

    propose: the parameters of trial `number`, given the records of all trials. total: how many trials in the end.
    concurrent: how many at once. metric: the figure to tell of.
    """

    def __init__(self, folder: SearchFolder, propose: Propose, total: int, concurrent: int, metric: str) -> None:
        self.folder, self.propose, self.total, self.concurrent = folder, propose, total, concurrent
        self.shown_metric = metric
        self.records = {record.number: record for record in folder.records()}
        self.waiting = [record.number for record in self.records.values() if record.status == "running"]
        self.waiting += range(len(self.records), total)
        self.live: dict[int, Trial] = {}
        self.spec: dict[str, Any] = {}

    # ---- asked by Ray -----------------------------------------------------------------------------------------------

    def add_configurations(self, experiments: Any) -> None:
        (experiment,) = experiments
        self.spec = experiment.spec

    @property
    def total_samples(self) -> int:
        return self.total

    def is_finished(self) -> bool:
        return self._finished or not self.waiting

    def next_trial(self) -> Trial | None:
        if self.is_finished() or len(self.live) >= self.concurrent:
            return None
        number = self.waiting.pop(0)
        if number not in self.records:
            self.records[number] = Record(number, self.propose(number, list(self.records.values())))
        record = self.records[number]
        self.folder.write(record)
        log.info("trial %d/%d begins: %s", number + 1, self.total, shown(record.params))
        self.live[number] = Trial(
            self.spec["run"], config=dict(record.params), trial_id=f"{number:04}", storage=self.spec["storage"],
            checkpoint_config=self.spec["checkpoint_config"], max_failures=RETRIES,
            placement_group_factory=self.spec.get("resources_per_trial"),
        )  # fmt: skip
        return self.live[number]

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        record = self.records[int(trial_id)]
        self._take(record, result)
        self.folder.write(record)
        if self.shown_metric in record.figures and not {"cause", "finished"} & result.keys():
            log.info("trial %d/%d, step %d: %s", record.number + 1, self.total, record.step, self._score(record))

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        record = self.records[int(trial_id)]
        trial = self.live.pop(record.number)
        result = result or {}
        self._take(record, result)
        if error:
            record.status, record.cause = "failed", f"died {RETRIES + 1} times: {_last_error(trial)}"
        elif cause := result.get("cause"):
            record.status, record.cause = "failed", cause
        else:
            record.status = "finished" if result.get("finished") else "stopped"
        self.folder.write(record)
        outcome = record.cause or self._score(record)
        log.info("trial %d/%d %s: %s", record.number + 1, self.total, record.status, outcome)

    # ---- of use here ------------------------------------------------------------------------------------------------

    def _take(self, record: Record, result: Mapping[str, Any]) -> None:
        """What a report says. A trial that took over from another one has other parameters than at its beginning."""
        record.params = {name: result.get(f"config/{name}", value) for name, value in record.params.items()}
        record.figures = {name: float(result[name]) for name in BETTER if name in result} or record.figures
        record.step = result.get("step", record.step)
        record.node = result.get("node", record.node)

    def _score(self, record: Record) -> str:
        value = record.figures.get(self.shown_metric)
        return f"{self.shown_metric} {value:.4g}" if value is not None else "nothing measured"


def _last_error(trial: Trial) -> str:
    with open(trial.pickled_error_file, "rb") as file:
        return cause_of(cloudpickle.load(file))
