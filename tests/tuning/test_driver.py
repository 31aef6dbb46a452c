"""What a search asks Ray for, how it is continued and how it ends."""

import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune
from ray.tune.experiment import Experiment

import tuning.driver
from infra.config import to_yaml
from infra.errors import Stopped, UserError
from infra.storage import LocalStorage
from launch.runs.config import JobConfig, make_config
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import street_scenes
from tests.trainer import segmenters
from tests.tuning.made import BETA, T
from tuning.cluster import Share
from tuning.config import Request, parse_arguments
from tuning.driver import _keep_made_of, _resumed, _run, _tune, search
from tuning.folder import SearchFolder
from tuning.results import Record
from tuning.settle import design

SHARE = Share(ranks=1, cpus=1, gpus=0, concurrent=2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SearchFolder:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody there
    folder = SearchFolder(tmp_path / "search-made")
    folder.trials.mkdir(parents=True)
    return folder


def request(metric: str, *arguments: str) -> Request:
    return parse_arguments(["--metric", metric, "--evaluation.every", "1", *arguments])


def asked_of_ray(asked: Request, folder: SearchFolder, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a search asks `tune.run` for."""
    seen: list[dict[str, Any]] = []

    patch.setattr(tune, "run", lambda trial, **given: seen.append(given))
    patch.setattr(tune, "ExperimentAnalysis", lambda path: SimpleNamespace(trials=[]))
    _tune(asked, design(asked), SHARE, folder, {})
    return seen[0]


def test_a_seed_a_metric_and_the_number_of_trials_reach_the_searcher(
    folder: SearchFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def proposals(metric: str, *arguments: str) -> list[float]:
        """Beta of twenty trials, one after the other, whose metric is their beta."""
        given = asked_of_ray(request(metric, "--searcher", "optuna", *arguments), folder, monkeypatch)
        search = given["search_alg"]
        search.set_search_properties(None, None, given["config"])
        betas = []
        for number in range(20):
            betas.append(search.suggest(str(number))[BETA])
            search.on_trial_complete(str(number), {metric: betas[-1], "finished": True})
        return betas

    more, less = proposals("mIoU"), proposals("Dist")
    assert statistics.median(more[10:]) > 5 * statistics.median(less[10:])
    assert proposals("mIoU", "--trials", "10") == more != proposals("mIoU", "--seed", "1")
    assert proposals("mIoU", "--trials", "30")[:4] != more[:4]  # still by chance


@pytest.mark.parametrize(("scheduler", "limit"), [("none", 2), ("asha", 2), ("pbt", 0)])
def test_only_pbt_has_all_its_trials_alive_at_once(
    scheduler: str, limit: int, folder: SearchFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = asked_of_ray(request("mIoU", "--scheduler", scheduler), folder, monkeypatch)
    assert given["search_alg"].max_concurrent == limit and given["num_samples"] == 10


@pytest.mark.parametrize(("searcher", "first"), [("random", "0_beta=1"), ("grid", "0_beta=1"), ("optuna", "1_beta=1")])
def test_trials_are_counted_from_nought(
    searcher: str, first: str, folder: SearchFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = asked_of_ray(request("mIoU", "--searcher", searcher), folder, monkeypatch)
    assert given["trial_name_creator"](SimpleNamespace(experiment_tag=first)) == "0000"


def test_ablations_are_rows_by_seeds(folder: SearchFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    given = asked_of_ray(request("mIoU", "--ablations", "srunit", "--seed", "5", "--seeds", "2"), folder, monkeypatch)
    search = given["search_alg"]
    search.add_configurations([Experiment("rows", print, config=given["config"], num_samples=given["num_samples"])])
    trials = []
    while trial := search.next_trial():
        search.on_trial_complete(trial.trial_id)
        trials.append((trial.config["row"], trial.config["seed"]))
    assert len(trials) == 16 and trials[:2] == [("CUT", 5), ("E1", 5)] and trials[8:10] == [("CUT", 6), ("E1", 6)]


def test_what_is_given_anew_with_resume(folder: SearchFolder) -> None:
    folder.request_file.write_text(to_yaml(request("mIoU", "--max-concurrent", "3", "--trials", "7").flat()))
    same = _resumed(parse_arguments(["--resume", "made"]), folder)
    assert (same.search.max_concurrent, same.search.trials, same.search.address) == (3, 7, None)
    anew = _resumed(parse_arguments(["--resume", "made", "--max-concurrent", "1", "--address", "auto"]), folder)
    assert (anew.search.max_concurrent, anew.search.trials, anew.search.address) == (1, 7, "auto")


def test_a_search_does_not_go_on_with_other_data_or_another_judge(folder: SearchFolder, tmp_path: Path) -> None:
    for name, count in (("data", 2), ("other", 3)):
        prepare(street_scenes(count, 1), LocalStorage(tmp_path / name), Encoding((64, 32)), progress=False)
        segmenters.save(tmp_path / f"judge-{name}", 1, segmenter=segmenters.network(count))

    def config(data: str, judge: str) -> JobConfig:
        return make_config(
            {"data.root": str(tmp_path / data), "evaluation.segmenter": str(tmp_path / f"judge-{judge}")}
        )

    _keep_made_of(folder, config("data", "data"))
    _keep_made_of(folder, config("data", "data"))
    with pytest.raises(UserError, match="made has as data.root has changed since it began: put it back"):
        _keep_made_of(folder, config("other", "data"))
    with pytest.raises(UserError, match="made has as evaluation.segmenter has changed"):
        _keep_made_of(folder, config("data", "other"))


def test_a_search_of_an_earlier_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trials = tmp_path / "runs" / "search-old" / "trials"
    trials.mkdir(parents=True)
    (trials.parent / "search.yaml").write_text("")
    (trials / "0000.json").write_text("{}")
    with pytest.raises(UserError, match="begun by an earlier version.*begin another"):
        search(parse_arguments(["--resume", "old"]))


@pytest.mark.parametrize("statuses", [["finished", "running"], ["finished"]])
def test_an_interrupted_search_says_how_it_goes_on(
    folder: SearchFolder, monkeypatch: pytest.MonkeyPatch, statuses: list[Any]
) -> None:
    def interrupted(*_: Any) -> list[Record]:
        return [Record(number, {BETA: 1e-4, T: 0.1}, status) for number, status in enumerate(statuses)]

    monkeypatch.setattr(tuning.driver, "_tune", interrupted)
    asked = request("mIoU", "--trials", "2")
    with pytest.raises(Stopped, match="--resume made goes on from here") as stop:
        _run(asked, design(asked), SHARE, folder)
    assert stop.value.exit_code == 130 and not folder.csv_file.exists()
