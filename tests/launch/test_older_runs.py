"""Runs that earlier code began: recorded_run/ has one, made before there were format numbers."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.config import FORMAT, flatten, read_yaml, to_yaml
from infra.errors import UserError
from launch.runs.config import parse_arguments
from launch.runs.folder import RunFolder
from launch.runs.translator import train
from trainer.checkpoint import Checkpoint
from trainer.translator import load_translator

pytestmark = pytest.mark.slow

RECORDED = Path(__file__).parent / "recorded_run"
OPTIONS = [
    "--global-batch", "2", "--crop", "16", "--ngf", "1", "--ndf", "1", "--method.generator.blocks", "6",
    "--method.discriminator.layers", "1", "--method.head-dim", "2", "--method.taps", "0,4", "--method.patches", "8",
    "--method.buffer", "2", "--optim.epochs", "2", "--optim.decay-epochs", "2", "--optim.ema", "0.9",
    "--evaluation.every", "1", "--loop.keep", "1", "--loop.samples", "1",
    "--loop.report-every", "1", "--loop.keep-logged", "0",
]  # fmt: skip


@pytest.fixture
def recorded(place: Path) -> RunFolder:
    """A copy to continue, in the working folder, beside its data."""
    for name in ("data", "run"):
        shutil.copytree(RECORDED / name, place / name, symlinks=True)
    return RunFolder(Path("run"))


def rewrite(run: RunFolder, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the configuration that the run's files hold, as if another version had written them."""
    config = read_yaml(run.config_file)
    change(config)
    run.config_file.write_text(to_yaml(config))
    for folder in run.checkpoints.glob("step_*"):
        state = json.loads((folder / "state.json").read_text())
        change(state["config"])
        write_state(folder, state)


def write_state(checkpoint: Path, state: dict[str, Any]) -> None:
    (checkpoint / "state.json").write_text(json.dumps(state))
    files = json.loads((checkpoint / "manifest.json").read_text())
    files["state.json"]["sha256"] = hashlib.sha256((checkpoint / "state.json").read_bytes()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(files))


def rows(run: RunFolder) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    timed = ("pairs_per_s", "memory_gib", "time", "data/wait", "save/")
    return [{name: row[name] for name in row if not name.startswith(timed)} for row in found]


def test_the_same_command_goes_on_and_ends(recorded: RunFolder) -> None:
    before, evaluated = rows(recorded), recorded.evaluations()
    old = load_translator(recorded.path)
    train(parse_arguments([*OPTIONS, "--data", "data", "--run-dir", "run", "--precision", "fp32"]))
    assert [row["step"] for row in rows(recorded)] == [1, 2, 3, 4] and rows(recorded)[:2] == before
    assert [row["step"] for row in recorded.evaluations()] == [1, 2, 3, 4] and recorded.evaluations()[:2] == evaluated
    new = load_translator(recorded.path)
    assert any(
        not torch.equal(a, b) for a, b in zip(old.translation.parameters(), new.translation.parameters(), strict=True)
    )
    assert recorded.config_file.read_text().startswith(f"format: {FORMAT}\n")
    state = json.loads((recorded.checkpoints / "step_4" / "state.json").read_text())
    assert state["format"] == FORMAT and (recorded.model / "MLmodel").is_file()


def test_what_was_left_open_stays_as_it_was(recorded: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options that are newer than the run have their defaults; a machine that would choose another precision, and draw
    street scenes where no data is named, goes on with the run's own. A run folder that is lost, too."""
    rewrite(
        recorded, lambda config: [config.pop(name) for name in ("method.bank.size", "model.antialias", "engine.tf32")]
    )
    shutil.copytree("run", "explicit", symlinks=True)
    shutil.copytree(recorded.checkpoints, "mirror", ignore=shutil.ignore_patterns("best"))
    monkeypatch.setattr("trainer.engines.base.has_fast_bf16", lambda: True)
    train(parse_arguments([*OPTIONS, "--run-dir", "run"]))
    saved = read_yaml(recorded.config_file)
    assert (saved["engine.precision"], saved["data.root"], saved["method.bank.size"]) == ("fp32", "data", 0)
    words = (
        "as the run began, since nothing else was asked for: --precision fp32 (this machine would choose bf16), --data"
    )
    assert words in recorded.log_file.read_text()
    train(parse_arguments([*OPTIONS, "--run-dir", "explicit", "--data", "data", "--precision", "fp32"]))
    assert rows(recorded) == rows(RunFolder(Path("explicit")))  # it also computed in what it says

    train(parse_arguments([*OPTIONS, "--run-dir", "new", "--data", "data", "--loop.mirror", "mirror"]))
    restored = RunFolder(Path("new"))
    assert read_yaml(restored.config_file)["engine.precision"] == "fp32"
    assert rows(restored) == rows(recorded)[2:]


def test_a_file_of_options_may_have_a_format_or_not(recorded: RunFolder) -> None:
    config = parse_arguments(["--config", "run/config.yaml"])
    assert flatten(config) == flatten(parse_arguments([*OPTIONS, "--data", "data", "--run-dir", "run", "--precision",
    "fp32",
        "--max-steps", "2", "--loop.report-every", "10", "--loop.keep-logged", "1", "--engine.compile",
        "false", "--engine.triton", "false"]))  # fmt: skip
    Path("new.yaml").write_text(to_yaml(flatten(config)))
    assert parse_arguments(["--config", "new.yaml"]) == config


def test_a_later_format_is_refused(recorded: RunFolder) -> None:
    line = parse_arguments([*OPTIONS, "--data", "data", "--run-dir", "run", "--precision", "fp32"])
    newest = recorded.checkpoints / "step_2"
    state = json.loads((newest / "state.json").read_text())
    write_state(newest, state | {"format": FORMAT + 1})
    for use in (lambda: train(line), lambda: load_translator(recorded.path), lambda: Checkpoint(newest)):
        with pytest.raises(
            UserError, match=f"step_2 has the format {FORMAT + 1}, and this version reads up to {FORMAT}"
        ):
            use()
    write_state(newest, state)
    recorded.config_file.write_text(f"format: {FORMAT + 1}\n" + recorded.config_file.read_text())
    with pytest.raises(
        UserError, match=f"run/config.yaml has the format {FORMAT + 1}, .* use the version that wrote it"
    ):
        train(line)
