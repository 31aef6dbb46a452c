"""How a training of several ranks ends: told to, or since one of them is in trouble; and how it goes on."""

import contextlib
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen

import psutil
import pytest

from infra.storage import open_storage
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import street_scenes
from tests.end_to_end.jobs import (
    BINARIES,
    LAUNCHERS,
    OPTIONS,
    TRAIN,
    finish,
    kill,
    losses,
    run,
    spawn,
    start,
    wait_for_step,
)

pytestmark = pytest.mark.slow

SCRIPTS = ("train.py", "faulty_rank.py")
SCRIPT = str(Path(__file__).with_name("faulty_rank.py"))
ENDLESS = ["--max-steps", "100000", "--optim.epochs", "100000", "--loop.checkpoint-every", "100000",
           "--loop.report-every", "2", "--loop.samples-every", "100000", "--loop.keep-logged", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("data"))
    prepare(street_scenes(count=7, test_count=3), open_storage(root), Encoding((64, 32), shard_size=4), progress=False)
    return root


def ranks_of(job: Popen[str]) -> list[psutil.Process]:
    """By rank."""
    found = []
    for process in psutil.Process(job.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ends at this moment
            if "RANK" in process.environ() and any(part.endswith(SCRIPTS) for part in process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


@pytest.fixture
def begun(data: str, tmp_path: Path) -> Iterator[Callable[..., tuple[Popen[str], list[psutil.Process]]]]:
    """Starts an endless training in `run`, and returns it and its ranks after step 4."""
    jobs: list[tuple[Popen[str], list[psutil.Process]]] = []

    def begin(launcher: str, *options: str) -> tuple[Popen[str], list[psutil.Process]]:
        job = start(launcher, "--data", data, "--run-dir", "run", *ENDLESS, *options, cwd=tmp_path)
        wait_for_step(job, tmp_path / "run", 4)
        jobs.append((job, ranks_of(job)))
        return jobs[-1]

    yield begin
    for job, ranks in jobs:
        for rank in ranks:
            if rank.is_running():
                rank.kill()
        if job.poll() is None:
            kill(job)


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of the metrics' last line, of the checkpoints and of the status."""
    facts = json.loads((run_dir / "status.json").read_text())
    checkpoints = [int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").iterdir()]
    return [losses(run_dir)[-1]["step"], *checkpoints, facts["step"], facts["checkpoint"]]


@pytest.mark.parametrize("launcher", ["ddp", "deepspeed"])
def test_sigterm_to_the_launcher_saves_the_step_and_leaves_no_rank(
    launcher: str, begun: Callable[..., tuple[Popen[str], list[psutil.Process]]], tmp_path: Path
) -> None:
    """The deepspeed launcher ends at once, and its ranks then."""
    job, ranks = begun(launcher, "--loop.grace", "120")
    job.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(ranks, timeout=100)
    job.communicate(timeout=100)
    assert not alive and job.returncode != 0
    assert len(set(saved_steps(tmp_path / "run"))) == 1
    facts = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (facts["state"], facts["exit_code"]) == ("KILLED", 143)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    begun: Callable[..., tuple[Popen[str], list[psutil.Process]]], tmp_path: Path
) -> None:
    job, ranks = begun("deepspeed", "--loop.report-every", "4", "--loop.grace", "120")
    ranks[1].send_signal(signal.SIGUSR1)
    output = finish(job, expect=143)
    assert output.count("error: told to stop after step") == 1 and "Traceback" not in output
    assert len(set(saved_steps(tmp_path / "run"))) == 1


@pytest.mark.parametrize(
    ("trouble", "words"),
    [("suspend", "rank 1 (process {pid} on {host}) gave no sign of life for 8 s: it is stopped, or its machine is away"),
     ("kill", "rank 1 (process {pid} on {host}) has died")],
)  # fmt: skip
def test_a_rank_that_is_stopped_or_dies_ends_the_others(
    trouble: str, words: str, begun: Callable[..., tuple[Popen[str], list[psutil.Process]]], tmp_path: Path
) -> None:
    job, (zero, one) = begun("ddp", "--engine.silence", "8")
    getattr(one, trouble)()
    _, alive = psutil.wait_procs([zero], timeout=60)
    assert not alive
    if trouble == "suspend":
        one.kill()  # torchrun would do so in half a minute
    output, _ = job.communicate(timeout=100)
    expected = words.format(pid=one.pid, host=socket.gethostname())
    assert output.count(f"error: {expected}") == 1
    assert expected in (tmp_path / "run" / "train.log").read_text()
    facts = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (facts["state"], facts["exit_code"]) == ("KILLED", 75)


@pytest.mark.parametrize(
    ("fault", "options", "words", "code"),
    [
        ("raises", [], "[rank 1] ValueError: a shard in flames", 1),
        ("hangs", ["--engine.longest-step", "8"], "rank 0, 1 (--engine.longest-step)", 1),
        ("elsewhere", [], "the run folder run of rank 0 is not there for rank 1 on", 2),
    ],
)
def test_what_goes_wrong_on_rank_1_is_said_once_by_rank_0(
    fault: str, options: list[str], words: str, code: int, data: str, tmp_path: Path
) -> None:
    job = start(
        "deepspeed", "--data", data, "--run-dir", "run", *ENDLESS, "--loop.report-every", "1", *options,
        cwd=tmp_path, script=SCRIPT, options=[fault, *OPTIONS],
    )  # fmt: skip
    output = finish(job, expect=code)
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and words in said[0], output
    assert words in (tmp_path / "run" / "train.log").read_text()
    if fault == "hangs":
        assert "time.sleep(3600)" in (tmp_path / "run" / "logs" / "rank_1.log").read_text()


def test_torchrun_restarts_it_again_and_again_in_its_own_folder(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchrun = [str(BINARIES / "torchrun"), "--standalone", "--nproc_per_node", "2", "--max-restarts", "3"]
    monkeypatch.setitem(LAUNCHERS, "restarting", torchrun)
    job = start("restarting", "--data", data, cwd=tmp_path)
    for step in (1, 4, 7):
        deadline = time.monotonic() + 240
        while not (folders := list((tmp_path / "runs").glob("*"))) and time.monotonic() < deadline:
            time.sleep(0.1)
        wait_for_step(job, folders[0], step)
        ranks_of(job)[step % 2].kill()
        while losses(folders[0])[-1]["step"] >= step and len(ranks_of(job)) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
    finish(job)
    (folder,) = (tmp_path / "runs").glob("*")
    assert [row["step"] for row in losses(folder)] == list(range(1, 9))
    assert json.loads((folder / "status.json").read_text())["state"] == "FINISHED"
    assert len(json.loads((folder / "environment.json").read_text())) == 4


def test_mlflow_that_never_answers_does_not_keep_a_told_run(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        command = [
            *LAUNCHERS["single"],
            TRAIN,
            *OPTIONS,
            "--data",
            data,
            "--run-dir",
            "run",
            *ENDLESS,
            "--loop.grace",
            "20",
        ]
        job = spawn(command, cwd=tmp_path, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{hole.getsockname()[1]}")
        wait_for_step(job, tmp_path / "run", 4)
        begun = time.monotonic()
        job.send_signal(signal.SIGINT)
        output = finish(job, expect=130)
    assert time.monotonic() - begun < 25 and "Traceback" not in output
    assert len(set(saved_steps(tmp_path / "run"))) == 1


def test_fewer_ranks_take_more_micro_batches_and_give_the_same_numbers(data: str, tmp_path: Path) -> None:
    run("ddp", "--data", data, "--run-dir", "run", "--max-steps", "4", cwd=tmp_path)
    output = run("single", "--data", data, "--run-dir", "run", cwd=tmp_path)
    assert "--optim.accumulation 2 (micro-batches no larger than before, on 1 ranks)" in output
    run("ddp", "--data", data, "--run-dir", "whole", cwd=tmp_path)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
