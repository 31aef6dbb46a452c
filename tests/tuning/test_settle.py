"""What a search fills in that was left open."""

from pathlib import Path
from typing import Any

import pytest

import launch.runs.embedded
import tuning.settle
from launch.runs.config import make_config
from launch.runs.embedded import Setup
from tuning import embedded
from tuning.config import parse_arguments
from tuning.settle import evaluations, settle

pytestmark = pytest.mark.slow


def settled(data: str, *arguments: str) -> dict[str, Any]:
    request = settle(parse_arguments(["--data", data, *arguments]), gpu=False)
    return {"evaluations": evaluations(request), "metric": request.search.metric, **request.options}


def test_trials_are_judged_four_times_by_what_can_be_had(data: str) -> None:
    options = settled(data)
    assert options["evaluations"] == 4 and options["metric"] == options["evaluation.best"] == "Dist"
    assert settled(data, "--evaluation.every", "2")["evaluations"] == 10  # of 20 epochs


def test_trials_keep_little_unless_told(data: str) -> None:
    assert {"loop.keep": 1, "loop.keep_logged": 0}.items() <= settled(data).items()
    assert settled(data, "--loop.keep", "3", "--loop.keep-logged", "2").items() >= {
        "loop.keep": 3, "loop.keep_logged": 2
    }.items()  # fmt: skip


def test_paths_hold_in_any_folder(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Judge:
        """Of a segmenter that is not read."""

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def best_metric(self, name: str) -> str:
            return "mIoU"

    monkeypatch.setattr(tuning.settle, "Evaluator", Judge)
    monkeypatch.chdir(tmp_path)
    options = settled("data", "--evaluation.segmenter", "runs/segmenter", "--evaluation.inception", "weights.pt")
    assert options["data.root"] == data
    assert options["evaluation.segmenter"] == str(tmp_path / "runs/segmenter")
    assert options["evaluation.inception"] == str(tmp_path / "weights.pt")


@pytest.mark.parametrize("setup", [embedded.SMALL, embedded.LARGE])
def test_the_segmenter_of_a_search_learns_from_scenes_of_its_own(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, int, int]] = []
    read: list[str] = []

    def draw(count: int, test_count: int, seed: int, *layouts: Any) -> None:
        drawn.append((count, test_count, seed))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch.runs.embedded, "street_scenes", draw)
    monkeypatch.setattr(launch.runs.embedded, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(launch.runs.embedded, "train", lambda config: read.append(config.data.root))
    trials = embedded.draw(setup)
    embedded.segmenter(setup)
    (count, tests, seed), (segmenter_count, segmenter_tests, segmenter_seed) = drawn
    assert (count, segmenter_count, tests, segmenter_tests) == (*setup.counts[:2], setup.counts[2], setup.counts[2])
    assert seed != segmenter_seed and read != [str(trials)]
    assert make_config(embedded.options(setup)).evaluation.every > 0
