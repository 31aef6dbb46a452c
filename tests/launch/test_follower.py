"""MLflow follows a run folder: what arrives, once, whatever happens in between."""

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from mlflow import MlflowClient

from infra.config import to_yaml
from infra.errors import UserError
from infra.json_lines import JsonLines
from launch import track
from launch.runs import follower
from launch.runs.folder import RunFolder, write_png
from launch.runs.follower import Follower, grouped, is_sent, send
from launch.runs.lock import RunLock
from launch.runs.status import StatusFile
from trainer.checkpoint import write_checkpoint

pytestmark = pytest.mark.slow

GREY = np.full((16, 32, 3), 128, np.uint8)


class Training:
    """Leaves in a folder what a run does."""

    def __init__(self, path: Path, keep_logged: int = 1) -> None:
        self.folder = RunFolder(path)
        path.mkdir(parents=True, exist_ok=True)
        options = {"seed": 7, "loop.keep_logged": keep_logged}
        self.folder.config_file.write_text(to_yaml(options))
        data = {"root": "data/streets", "digest": "0" * 64, "about": {"images": {"train/source": 4}}}
        self.about = {
            "experiment": "streets",
            "model": "generator",
            "keep_logged": keep_logged,
            "tags": {"task": "gta2city"},
            "data_set": data,
        }
        self.folder.describe(self.about)
        self.folder.write_status("RUNNING")

    def steps(self, *steps: int) -> None:
        file = JsonLines(self.folder.metrics_file)
        for step in steps:
            file.append({"step": step, "lr": 2e-4, "G": step / 3, "NCE": float("nan"), "time": 1000.0 + step})
        file.close()

    def evaluation(self, step: int) -> None:
        file = JsonLines(self.folder.evaluations_file)
        file.append({"step": step, "Dist": step / 7, "Acc": {"30": 0.5}, "FID": "not available", "time": 2000.0})
        file.close()
        write_png(self.folder.evaluation_pictures / f"step_{step}" / "evaluation.png", GREY)

    def checkpoint(self, step: int) -> None:
        write_checkpoint(self.folder.checkpoints / f"step_{step}", {}, {"step": step})

    def sample(self, step: int) -> None:
        write_png(self.folder.samples / f"step_{step}.png", GREY)

    def evaluated_afterwards(self, step: int) -> None:
        write_png(self.folder.samples / "flips.png", GREY)
        self.folder.evaluation_file.write_text(json.dumps({"mIoU": 0.25, "step": step, "images": 3}))

    @property
    def id(self) -> str:
        return self.folder.run_id_file.read_text().strip()


def steps_of(client: MlflowClient, training: Training, metric: str) -> list[int]:
    return sorted(row.step for row in client.get_metric_history(training.id, metric))


def pictures_of(client: MlflowClient, training: Training) -> list[str]:
    names = {Path(item.path).name for item in client.list_artifacts(training.id, "images")}
    return sorted("+".join(name.split("+")[:3]) for name in names if name.endswith(".png"))


def checkpoints_of(client: MlflowClient, training: Training) -> list[str]:
    return sorted(Path(item.path).name for item in client.list_artifacts(training.id, "checkpoints"))


def test_everything_in_the_folder_arrives_once(client: MlflowClient, tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    training.sample(0)
    training.steps(1, 2, 3)
    training.evaluation(3)
    training.checkpoint(3)
    for _ in range(2):
        send(training.folder, create=True)
    assert client.get_run(training.id).info.status == "RUNNING"
    training.steps(4)
    training.sample(4)
    training.checkpoint(4)
    training.evaluated_afterwards(4)
    training.folder.write_status("FINISHED")
    for _ in range(2):
        send(training.folder, create=True)

    run = client.get_run(training.id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params == {"seed": "7", "loop.keep_logged": "1"} and run.data.tags["task"] == "gta2city"
    assert run.inputs is not None
    assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["streets"]
    assert steps_of(client, training, "Loss/G") == steps_of(client, training, "train/lr") == [1, 2, 3, 4]
    assert "Loss/NCE" not in run.data.metrics and "eval/FID" not in run.data.metrics
    history = client.get_metric_history(training.id, "Loss/G")
    assert [(row.value, row.timestamp) for row in history[:2]] == [(1 / 3, 1_001_000), (2 / 3, 1_002_000)]
    assert run.data.metrics["eval/Acc/30"] == 0.5 and run.data.metrics["eval/Dist"] == 3 / 7
    assert steps_of(client, training, "eval/mIoU") == [4]
    assert pictures_of(client, training) == ["evaluation+step+3", "flips+step+4", "samples+step+0", "samples+step+4"]
    assert checkpoints_of(client, training) == ["step_4"]
    assert is_sent(training.folder)


def test_what_is_done_again_after_a_resume_is_not_sent_again(client: MlflowClient, tmp_path: Path) -> None:
    """Whatever was sent before the kill: a run that goes on from step 2 writes steps 3 and 4 again."""
    training = Training(tmp_path / "run")
    training.steps(1, 2, 3, 4)
    training.evaluation(4)
    send(training.folder, create=True)
    file = JsonLines(training.folder.metrics_file)
    file.truncate_after(2)
    file.close()
    training.folder.evaluations_file.unlink()
    again = Training(training.folder.path)
    again.steps(3, 4, 5)
    again.evaluation(4)
    send(again.folder, create=True)
    assert len(client.get_metric_history(training.id, "Loss/G")) == 5
    assert steps_of(client, training, "eval/Dist") == [4]


def test_a_kill_between_the_sending_and_its_note_repeats_no_metric(client: MlflowClient, tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    training.steps(1, 2, 3)
    send(training.folder, create=True)
    sent = json.loads(training.folder.sent_file.read_text())
    training.folder.sent_file.write_text(json.dumps(sent | {"metrics": 1}))
    send(training.folder, create=True)
    assert steps_of(client, training, "Loss/G") == [1, 2, 3]


def test_a_kill_as_soon_as_the_run_has_an_id_loses_nothing(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path / "run")
    training.steps(1, 2)
    training.evaluation(2)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(follower.MlflowRun, "params", killed)
        with pytest.raises(KeyboardInterrupt):
            send(training.folder, create=True)
    assert training.folder.run_id_file.exists()
    send(training.folder, create=True)
    assert steps_of(client, training, "eval/Dist") == [2]


def test_a_run_that_was_killed_without_a_word_is_killed_in_mlflow_until_it_goes_on(
    client: MlflowClient, tmp_path: Path
) -> None:
    training, lock = Training(tmp_path / "run"), RunLock()
    for held, status in ((True, "RUNNING"), (False, "KILLED"), (True, "RUNNING")):
        if held:
            lock.take(training.folder.lock_file)
            StatusFile(training.folder, 0, 10)
        else:
            lock.release()
        send(training.folder, create=True)
        assert client.get_run(training.id).info.status == status


def test_the_newest_checkpoints_stay_and_older_ones_go(client: MlflowClient, tmp_path: Path) -> None:
    training = Training(tmp_path / "run", keep_logged=2)
    for step in (1, 2, 3):
        training.checkpoint(step)
        send(training.folder, create=True)
    assert checkpoints_of(client, training) == ["step_2", "step_3"]
    none = Training(tmp_path / "none", keep_logged=0)
    none.checkpoint(1)
    send(none.folder, create=True)
    assert checkpoints_of(client, none) == []


def test_a_thread_follows_while_the_run_goes_on(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "POLL_S", 0.02)
    training = Training(tmp_path / "run")
    training.steps(1)
    following = Follower(training.folder)
    deadline = time.monotonic() + 30
    while not training.folder.run_id_file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    with training.folder.metrics_file.open("a") as file:  # half a line is not read
        file.write('{"step": 2, "G": 0.')
        file.flush()
        time.sleep(0.1)
        file.write('5, "time": 5.0}\n')
    training.folder.write_status("KILLED")
    following.finish()
    assert steps_of(client, training, "Loss/G") == [1, 2]
    assert client.get_run(training.id).info.status == "KILLED"


def test_a_run_made_offline_is_sent_by_a_command(
    client: MlflowClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = follower.store_uri()
    monkeypatch.setattr(follower, "RETRY_S", 0.05)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    training = Training(tmp_path / "run")
    following = Follower(training.folder)
    training.steps(1, 2)
    time.sleep(0.5)  # several attempts
    training.folder.write_status("FINISHED")
    following.finish()
    away, left = [record.getMessage() for record in caplog.records]
    assert "http://127.0.0.1:9 does not answer" in away and "\n" not in away
    assert "has not got everything" in left and f"python launch/track.py {tmp_path / 'run'}" in left
    assert not training.folder.run_id_file.exists() and not is_sent(training.folder)

    monkeypatch.setattr("sys.argv", ["track.py", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        track.main()
    assert stop.value.code == 2 and "does not answer" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    track.main()
    assert f"{tmp_path / 'run'}: all sent" in capsys.readouterr().out
    assert steps_of(client, training, "Loss/G") == [1, 2]
    assert client.get_run(training.id).info.status == "FINISHED"

    monkeypatch.setattr("sys.argv", ["track.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        track.main()
    assert stop.value.code == 2 and "is not a run folder" in capsys.readouterr().err


def test_a_server_that_comes_back_gets_what_waited(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(follower, "RETRY_S", 0.05)
    monkeypatch.setattr(follower, "POLL_S", 0.02)
    caplog.set_level(logging.INFO, logger="launch")
    real, outage = MlflowClient.log_batch, {"left": 0}

    def failing(self: MlflowClient, *args: Any, **kwargs: Any) -> None:
        if outage["left"]:
            raise ConnectionError("reset")
        real(self, *args, **kwargs)

    def search(self: MlflowClient, max_results: int) -> None:
        outage["left"] -= 1
        raise ConnectionError("reset")

    monkeypatch.setattr(MlflowClient, "log_batch", failing)
    monkeypatch.setattr(MlflowClient, "search_experiments", search)
    training = Training(tmp_path / "run")
    send(training.folder, create=True)  # the options have arrived: the outage meets the metrics
    outage["left"] = 3
    training.steps(*range(1, 31))
    following = Follower(training.folder)
    deadline = time.monotonic() + 30
    while not any("answers again" in r.getMessage() for r in caplog.records) and time.monotonic() < deadline:
        time.sleep(0.02)
    following.finish()
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    assert steps_of(client, training, "Loss/G") == list(range(1, 31))


def test_what_the_store_refuses_costs_one_warning_and_the_rest_arrives(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(tmp_path / "run")
    for step in (1, 2):
        training.sample(step)
    training.steps(1)
    monkeypatch.setattr(MlflowClient, "log_image", lambda *_, **__: 1 / 0)
    send(training.folder, create=True)
    monkeypatch.undo()
    (record,) = caplog.records
    assert "did not take a picture" in record.getMessage()
    run = client.get_run(training.id)
    assert run.info.status == "RUNNING" and run.data.metrics["Loss/G"] == 1 / 3


def test_what_does_not_arrive_in_time_costs_one_warning(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arrives = threading.Event()
    monkeypatch.setattr(MlflowClient, "set_tag", lambda *_: arrives.wait(30))
    monkeypatch.setattr(follower, "PATIENCE_S", 0.5)
    training = Training(tmp_path / "run")
    following = Follower(training.folder)
    deadline = time.monotonic() + 30
    while not training.folder.run_id_file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    following.finish()
    (record,) = caplog.records
    assert "has not got everything" in record.getMessage()
    arrives.set()
    following._thread.join(30)


def test_one_process_sends_at_a_time(client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="launch")
    training = Training(tmp_path / "run")
    with FileLock(tmp_path / "run" / "mlflow.lock", thread_local=False):
        thread = threading.Thread(target=send, args=(training.folder,), kwargs={"create": True})
        thread.start()
        thread.join()
    assert "is being sent by the process that trains it" in caplog.text
    assert not training.folder.run_id_file.exists()


def test_another_store_gets_all_of_it_or_is_named(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path / "run")
    training.steps(1, 2)
    training.folder.run_id_file.write_text("0123456789abcdef0123456789abcdef\n")
    training.folder.sent_file.write_text(json.dumps({"run_id": "0123456789abcdef0123456789abcdef", "metrics": 2}))
    with pytest.raises(UserError, match="does not know the run"):
        send(training.folder, create=False)
    assert training.id == "0123456789abcdef0123456789abcdef"
    send(training.folder, create=True)
    assert steps_of(client, training, "Loss/G") == [1, 2]


def test_a_folder_of_an_earlier_version_is_not_sent_twice(client: MlflowClient, tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    training.steps(1, 2)
    send(training.folder, create=True)
    for file in (training.folder.sent_file, training.folder.about_file):  # which it did not write
        file.unlink()
    with pytest.raises(UserError, match="continue the run by its own command"):
        send(training.folder, create=True)
    training.evaluated_afterwards(2)
    send(training.folder, create=False)
    assert steps_of(client, training, "eval/mIoU") == [2]
    Training(training.folder.path).steps(3)  # it goes on by this version
    send(training.folder, create=True)
    assert len(client.get_metric_history(training.id, "Loss/G")) == 3


def test_mlflow_shows_losses_first() -> None:
    row = {"step": 3, "epoch": 1, "lr": 2e-4, "pairs_per_s": 9.0, "memory_gib": 1.0, "G_GAN": 0.5, "data/retries": 2}
    names = list(grouped(row))
    assert names == ["train/epoch", "train/lr", "train/pairs_per_s", "train/memory_gib", "Loss/G_GAN", "data/retries"]
    assert min([*names, "eval/mIoU"]) == "Loss/G_GAN"  # in the order of MLflow's sections
    assert grouped(row)["train/lr"] == 2e-4


def test_what_a_crash_left_of_its_files_keeps_nothing_from_being_sent(client: MlflowClient, tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    training.steps(1, 2)
    training.evaluation(2)
    send(training.folder, create=True)
    run = training.id
    training.folder.run_id_file.write_bytes(b"\0" * 33)  # mlflow_sent.json has it too
    with training.folder.metrics_file.open("ab") as file:
        file.write(b"\0" * 50 + b"\n")
    training.steps(3)
    send(training.folder, create=True)
    assert training.id == run and steps_of(client, training, "Loss/G") == [1, 2, 3]
    training.folder.sent_file.write_bytes(b"")
    training.folder.evaluation_file.write_bytes(b"\0")
    training.evaluation(3)
    send(training.folder, create=True)
    assert training.id == run and steps_of(client, training, "eval/Dist") == [2, 3]
    assert steps_of(client, training, "Loss/G") == [1, 2, 3]
