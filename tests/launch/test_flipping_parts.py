"""The arms' file, what the benchmark prepares, and processes that run at once, each by itself."""

import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.config import flatten, to_yaml
from infra.errors import UserError
from infra.storage import LocalStorage
from launch.flipping_arms import choose, read_arms
from launch.flipping_benchmark import TIERS, Benchmark, _half
from launch.flipping_data import BenchmarkData, OwnData, StreetScenes, name_of
from launch.runs.config import make_config
from launch.runs.data import data_identity
from launch.runs.embedded import Setup
from launch.runs.folder import RunFolder
from launch.runs.processes import run_all
from launch.runs.resume import has_finished
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import street_scenes
from tests.trainer import segmenters
from trainer.checkpointer import Checkpointer
from trainer.methods import Srunit
from trainer.methods.parts.robustness import Robustness
from trainer.optim import OptimConfig
from trainer.schedule import Schedule


def test_every_arm_of_the_file_is_a_training_of_every_tier() -> None:
    for arm in read_arms().values():
        for tier in TIERS.values():
            config = arm.config(tier.config, arm.options)
            if not arm.uses_segmenter:
                config.method.build(seed=0, global_batch=config.optim.global_batch)


@pytest.mark.parametrize(("arm", "weight"), [("srunit-released", 1.84), ("released-no-rest", 1.84), ("relative", 1.84)])
def test_arms_of_the_verdict_weigh_what_the_released_loss_does(arm: str, weight: float) -> None:
    method = (
        read_arms()[arm].config(TIERS["small"].config, read_arms()[arm].options).method.build(seed=0, global_batch=1)
    )
    assert isinstance(method, Srunit)
    (robust,) = [part for part in method.parts if isinstance(part, Robustness)]
    assert robust.effective_weight == pytest.approx(weight, rel=0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cut: [", "is not valid YAML"),
        ("cut", "holds no arms"),
        ("cut: {options: {}}", "the arm cut of .* is no {title: TEXT"),
        ("cut: {title: C, options: {}, round: 1}", "the arm cut of .* has round = 1: give {title"),
        ("cut: {title: C, options: {}, rounds: -1}", "the arm cut of .* has rounds = -1: give 0 or more"),
        ("cut: {title: C, options: [lr]}", r"the arm cut of .* has options = \['lr'\]: give {title"),
    ],
)
def test_a_file_that_holds_no_arms(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "arms.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_arms(tmp_path / "arms.yaml")
    with pytest.raises(UserError, match="cannot read the arms"):
        read_arms(tmp_path / "none.yaml")


def test_arms_are_chosen_by_name() -> None:
    arms = read_arms()
    assert [arm.name for arm in choose(arms, ["srunit", "cut"])] == ["srunit", "cut"]
    with pytest.raises(UserError, match="there is no arm cit: choose among cut, "):
        choose(arms, ["cit"])
    with pytest.raises(UserError, match="the arms cut cut name one twice"):
        choose(arms, ["cut", "cut"])


def test_a_judge_that_is_none_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    prepare(street_scenes(1, 1), LocalStorage(tmp_path / "data"), Encoding((64, 32)), progress=False)
    segmenters.save(tmp_path / "judge", 1, segmenter=segmenters.network(1))
    OwnData(str(tmp_path / "data"), "gta2city", tmp_path / "judge").check()
    data = OwnData(str(tmp_path / "data"), "gta2city", Path("nowhere"))
    with pytest.raises(UserError, match="there is no segmenter nowhere"):
        _benchmark(data, tmp_path / "out").run(tmp_path / "out/runs.json")
    assert not (tmp_path / "out").exists()


def _benchmark(data: BenchmarkData, out: Path, arm: str = "best") -> Benchmark:
    return Benchmark(TIERS["small"], data, out, choose(read_arms(), [arm]), data.names, [0], 4, 1)


def test_what_the_translators_learn_from_is_no_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(street_scenes(1, 1), LocalStorage(tmp_path / "data"), Encoding((64, 32)), progress=False)
    for name in ("judge", "S"):
        segmenters.save(tmp_path / name, 1, segmenter=segmenters.network(1))  # the same one at two places
    monkeypatch.setattr(Setup, "train_source_segmenter", lambda *_: tmp_path / "S")
    monkeypatch.setattr("launch.flipping_benchmark.train_all", lambda *_: pytest.fail("something is trained"))
    data = OwnData(str(tmp_path / "data"), "gta2city", tmp_path / "judge")
    with pytest.raises(UserError, match="judge is the segmenter that the arm best trains with: give another --judge"):
        _benchmark(data, tmp_path / "out").run(tmp_path / "out/runs.json")
    assert not (tmp_path / "data/matches").exists()


@pytest.mark.parametrize(("arms"), [("cut", "distancegan"), ("distancegan", "cut")])
def test_the_usual_steps_are_the_tiers_whatever_is_trained(tmp_path: Path, arms: tuple[str, str]) -> None:
    steps = {}
    for name, tier in TIERS.items():
        data = StreetScenes(tier, tmp_path)
        steps[name] = Benchmark(tier, data, tmp_path, choose(read_arms(), arms), ["none"], [0], None, 1).steps
    assert steps == {"small": 1200, "gpu": 5000}


@settings(max_examples=300, deadline=None)
@given(images=st.integers(1, 30000), steps=st.integers(2, 50000), batch=st.integers(1, 16))
def test_a_training_has_the_steps_asked_for(images: int, steps: int, batch: int) -> None:
    half = _half(steps * batch, images)
    schedule = Schedule(OptimConfig(global_batch=batch, epochs=half, decay_epochs=half), images)
    assert schedule.steps == steps
    for parts in (2, 4):
        for part in range(1, parts + 1):
            done = -(-steps * part // parts)
            assert schedule.passes(done, 2 * half / parts)
            assert done == 1 or steps < 2 * parts or not schedule.passes(done - 1, 2 * half / parts)


def test_a_segmenter_of_the_sources_needs_no_targets_of_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees no target in round 0."""
    monkeypatch.setattr(Setup, "train_source_segmenter", lambda *_: Path("S"))
    monkeypatch.setattr("launch.flipping_benchmark.matched", lambda *_: "match")
    monkeypatch.setattr("launch.flipping_benchmark.weights_of", str)
    monkeypatch.setattr("launch.flipping_benchmark.Rounds", lambda *_, **__: pytest.fail("there are no rounds"))
    prepare(street_scenes(2, 1), LocalStorage(tmp_path / "data"), Encoding((64, 64)), progress=False)
    data = OwnData(str(tmp_path / "data"), "gta2city", tmp_path / "judge")
    arms = choose(read_arms(), ["best"])
    benchmark = Benchmark(TIERS["small"], data, tmp_path / "out", arms, ["data"], [0], 4, 1)
    aids = benchmark._prepare_aids(arms[0], "data")
    assert (aids.segmenter, aids.match) == (Path("S"), "match")


@pytest.mark.parametrize("root", ["data/gta2city", "data/gta2city/", "s3://bucket/gta2city"])
def test_the_name_of_data(root: str) -> None:
    assert name_of(root) == "gta2city"


def test_a_run_that_ended_on_other_data_is_not_taken_for_one_on_these(tmp_path: Path) -> None:
    for name, seed in (("data", 0), ("other", 1)):
        scenes = street_scenes(1, 1, seed=seed)
        prepare(scenes, LocalStorage(tmp_path / name), Encoding((64, 32)), progress=False)
    folder = RunFolder(tmp_path / "run")
    on, others = (make_config({"data.root": str(tmp_path / name)}) for name in ("data", "other"))
    assert not has_finished(folder, on)
    state = {"step": 4, "data": data_identity(str(tmp_path / "data")), "config": {}, "scalers": {}}
    Checkpointer(folder.checkpoints, keep=1).save(4, {}, state)
    folder.config_file.write_text(to_yaml(flatten(on)))
    assert not has_finished(folder, on)
    folder.model.mkdir()
    assert has_finished(folder, on)
    with pytest.raises(UserError, match="run was trained on other data than .*/other has now: name another --out"):
        has_finished(folder, others)


def test_processes_run_some_at_once_and_say_what_went_wrong(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time, pathlib\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "here.mkdir()\n"
        "while len(list(here.parent.glob('run-*'))) < int(sys.argv[2]): time.sleep(0.01)\n"  # for the one beside it
        "sys.exit(None if sys.argv[3] == 'well' else 'error: ' + sys.argv[3])\n"
    )
    commands = {
        "a": [script, tmp_path / "run-a", 2, "well"],
        "b": [script, tmp_path / "run-b", 2, "too bad"],
        "c": [script, tmp_path / "run-c", 3, "well"],
    }
    with closing(run_all(commands, tmp_path / "logs", 2)) as ended:
        found = dict(ended)
    assert found == {"a": None, "b": f"too bad (see {tmp_path / 'logs' / 'b.log'})", "c": None}


@pytest.mark.parametrize(("given", "found"), [({}, "2"), ({"OMP_NUM_THREADS": "1"}, "1")])
def test_processes_share_the_cores_or_take_the_threads_they_are_given(
    given: dict[str, str], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    script = tmp_path / "script.py"
    script.write_text("import os; print(os.environ['OMP_NUM_THREADS'])")
    with closing(run_all({"a": [script]}, tmp_path / "logs", 2)) as ended:
        assert dict(ended) == {"a": None}
    assert (tmp_path / "logs/a.log").read_text() == f"{found}\n"


def test_a_killed_command_ends_its_processes_which_until_then_are_not_started_twice(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, signal, time\n"
        "def end(*_):\n"
        "    pathlib.Path('ended').touch()\n"
        "    while not pathlib.Path('go').exists(): time.sleep(0.01)\n"  # as if it saved a checkpoint
        "    raise SystemExit\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "pathlib.Path('there').touch()\n"
        "time.sleep(60)\n"
    )
    command = (
        "from launch.runs.processes import run_all; from pathlib import Path\n"
        "list(run_all({'a': ['script.py']}, Path(), 1))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    starter = subprocess.Popen([sys.executable, "-c", command], cwd=tmp_path, env=environment)
    wait_for(tmp_path / "there")
    starter.kill()
    starter.wait()
    wait_for(tmp_path / "ended")
    ((_, why),) = run_all({"a": [script]}, tmp_path, 1)
    assert why and why.startswith("another process is at it and writes")
    (tmp_path / "go").touch()


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.02)
