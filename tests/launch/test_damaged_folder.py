"""A run goes on whatever a crash of the machine has left of the files in its folder."""

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.errors import UserError
from infra.json_lines import JsonLines, read_records
from infra.storage import LocalStorage, StorageUnavailable
from launch.runs import training, translator
from launch.runs.config import make_config
from launch.runs.folder import RunFolder
from pipelines.manifest import MANIFEST
from tests.pipelines.shardmaker import write_root, write_split

OPTIONS = {
    "method.generator.ngf": 2, "method.generator.blocks": 6, "method.discriminator.ndf": 2, "method.head_dim": 2,
    "method.patches": 4, "method.name": "cut", "data.root": "data", "data.crop": 32, "data.decoder": "pillow",
    "optim.epochs": 2.0, "optim.decay_epochs": 2.0, "loop.samples": 1, "loop.checkpoint_every": 1, "run_dir": "run",
    "engine.device": "cpu", "engine.precision": "fp32", "evaluation.every": 1.0,
}  # fmt: skip
DOMAINS = ("source", "target")
LINES = ("metrics.jsonl", "evaluations.jsonl")
TEXTS = ("config.yaml", "environment.json", "train.log", "status.json", "mlflow.json", "mlflow_sent.json", "mlflow_run_id",
         "evaluation.json")  # fmt: skip

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) * 2 // 3],
    "NUL at the end": lambda content: content + b"\0" * 100,
    "NUL alone": lambda content: b"\0" * len(content),
    "NUL at the end of a line": lambda content: content + b"\0" * 100 + b"\n",
}


@pytest.fixture
def begun(place: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run of two steps in "run"."""
    storage = LocalStorage(place / "data")
    manifest = write_root(storage, source=(1,), target=(1,))
    tests = {f"test/{domain}": write_split(storage, f"test/{domain}", (1,)) for domain in DOMAINS}
    manifest = dataclasses.replace(manifest, splits=manifest.splits | tests, paired=True)
    storage.write(MANIFEST, manifest.to_json().encode())
    monkeypatch.setattr(training, "Follower", lambda folder: SimpleNamespace(finish=lambda: None))
    monkeypatch.setattr(translator, "save_pyfunc_model", lambda folder, *_: folder.mkdir(exist_ok=True))
    train(2)
    folder = RunFolder(place / "run")
    folder.run_id_file.write_text("0123456789abcdef\n")
    folder.sent_file.write_text(json.dumps({"run_id": "0123456789abcdef"}, indent=1))
    folder.evaluation_file.write_text(json.dumps({"step": 2, "Dist": 1.0}, indent=1))
    return folder


def train(steps: int, **options: Any) -> None:
    translator.train(make_config(OPTIONS, {"loop.max_steps": steps}, options))


def losses(folder: RunFolder) -> dict[int, float]:
    return {row["step"]: row["G"] for row in read_records(folder.metrics_file)}


def test_a_run_goes_on_with_every_file_damaged(begun: RunFolder, place: Path) -> None:
    whole, wanted = place / "whole", [*LINES, *TEXTS]
    assert not [name for name in wanted if not (begun.path / name).is_file()]
    shutil.copytree(begun.path, whole, symlinks=True)
    train(3)
    expected = losses(begun)[3]
    for kind, damaged in DAMAGES.items():
        shutil.rmtree(begun.path)
        shutil.copytree(whole, begun.path, symlinks=True)
        for name in wanted:
            file = begun.path / name
            file.write_bytes(damaged(file.read_bytes()))
        train(3)
        assert losses(begun)[3] == expected, kind
        assert len(losses(begun)) == 3 or kind in ("empty", "cut", "NUL alone")
        assert json.loads((begun.path / "environment.json").read_text())[-1]["command"]
        assert begun.saved()["loop.max_steps"] == 3
        assert begun.evaluations()[-1]["step"] == 3


def test_a_damaged_configuration_is_taken_from_the_checkpoint(begun: RunFolder) -> None:
    begun.config_file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"step_2 has optim.lr = 0.0002, not 0.1: repeat its options"):
        train(3, **{"optim.lr": 0.1})


def test_lines_that_are_damaged_are_left_out_and_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        b'{"step": 1}',
        b"\0\0\0",
        b'{"step": "1"}',
        b"[1]",
        b"3",
        b"\xff",
        b"[" * 100_000,
        b'{"G": 1}',
        b'{"step": 2}',
    ]
    path.write_bytes(b"\n".join(lines) + b'\n{"st')
    assert read_records(path) == [{"step": 1}, {"step": 2}] and "7 damaged lines are left out" in caplog.text
    file = JsonLines(path)
    file.truncate_after(2)
    file.append({"step": 3})
    file.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert read_records(tmp_path / "none") == []


def test_a_start_that_was_killed_before_its_configuration_was_there_begins_again(begun: RunFolder) -> None:
    other = RunFolder(begun.path.parent / "other")
    other.samples.mkdir(parents=True)
    (other.path / ".tmp-0123").write_bytes(b"task: gta2ci")
    other.lock_file.touch()
    train(1, run_dir="other")
    assert other.status() == "FINISHED"
    (other.path / "notes.txt").write_text("mine")
    other.config_file.unlink()
    with pytest.raises(UserError, match="exists and is not a run folder"):
        train(1, run_dir="other")


@pytest.mark.parametrize("full", ["mkdir", "write"])
def test_a_full_disk_at_the_start_is_an_outage(
    begun: RunFolder, full: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which passes: whoever starts the command again need change nothing."""

    def raises(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        if full == "mkdir":
            disk.setattr(Path, "mkdir", raises)
        else:
            disk.setattr("infra.storage._open_temporary", raises)
        with pytest.raises(StorageUnavailable, match="No space left on device"):
            RunFolder(tmp_path / "run").open(make_config(OPTIONS))
    RunFolder(tmp_path / "run").open(make_config(OPTIONS))


def test_fewer_steps_than_are_done_are_refused(begun: RunFolder) -> None:
    shutil.rmtree(begun.model)  # killed before it was left
    with pytest.raises(UserError, match="run has done 2 steps, more than the 1 asked for: give --max-steps 2 or more"):
        train(1)
    train(2)
    assert begun.model.is_dir()
