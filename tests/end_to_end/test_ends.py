"""How a training of several ranks ends: told to, or since one of them is in trouble; and how it goes on."""

import contextlib
import json
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen

import psutil
import pytest

from tests.end_to_end.jobs import (
    BINARIES,
    LAUNCHERS,
    OPTIONS,
    TRAIN,
    finish,
    kill,
    losses,
    run,
    small_data,
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
    return small_data(str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def whole(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    run("ddp", "--data", data, "--run-dir", "run", cwd=folder)
    return folder / "run"


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
    jobs: list[Popen[str]] = []
    all_ranks: list[psutil.Process] = []

    def begin(launcher: str, *options: str) -> tuple[Popen[str], list[psutil.Process]]:
        job = start(launcher, "--data", data, "--run-dir", "run", *ENDLESS, *options, cwd=tmp_path)
        jobs.append(job)
        wait_for_step(job, tmp_path / "run", 4)
        ranks = ranks_of(job)
        all_ranks.extend(ranks)
        return job, ranks

    yield begin
    for rank in all_ranks:
        if rank.is_running():
            rank.kill()
    for job in jobs:
        if job.poll() is None:
            kill(job)


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of the metrics' last line, of the checkpoints and of the status."""
    facts = json.loads((run_dir / "status.json").read_text())
    checkpoints = [int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").iterdir()]
    return [losses(run_dir)[-1]["step"], *checkpoints, facts["step"], facts["checkpoint"]]


def status_of(run_dir: Path) -> tuple[str, int]:
    facts = json.loads((run_dir / "status.json").read_text())
    return facts["state"], facts["exit_code"]


@pytest.mark.parametrize(
    ("launcher", "number", "everybody"),
    [("ddp", signal.SIGTERM, False), ("ddp", signal.SIGTERM, True), ("ddp", signal.SIGKILL, False),
     ("deepspeed", signal.SIGTERM, False)],
)  # fmt: skip
def test_a_signal_to_the_launcher_saves_the_step_and_leaves_no_rank(
    launcher: str, number: int, everybody: bool,
    begun: Callable[..., tuple[Popen[str], list[psutil.Process]]], tmp_path: Path,
) -> None:  # fmt: skip
    """The deepspeed launcher ends at once, and its ranks then; torchrun sends its ranks a signal that they may have had
    already, as everybody gets it that belongs to a job of a cluster."""
    job, ranks = begun(launcher, "--loop.grace", "120")
    for each in (*ranks, job) if everybody else (job,):
        each.send_signal(number)
    _, alive = psutil.wait_procs(ranks, timeout=100)
    job.communicate(timeout=100)
    assert not alive and job.returncode != 0
    assert len(set(saved_steps(tmp_path / "run"))) == 1
    assert status_of(tmp_path / "run") == ("KILLED", 143)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    begun: Callable[..., tuple[Popen[str], list[psutil.Process]]], tmp_path: Path
) -> None:
    job, ranks = begun("torchrun.py", "--loop.report-every", "4", "--loop.grace", "120")
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
    assert status_of(tmp_path / "run") == ("KILLED", 75)


def errors_in(output: str) -> list[str]:
    """Of the ranks."""
    return [line for line in output.splitlines() if line.startswith("error: ") and "ended by its ranks" not in line]


@pytest.mark.parametrize(
    ("fault", "launcher", "options", "words", "code"),
    [
        ("raises", "torchrun.py", [], "[rank 1] ValueError: a shard in flames", 1),
        ("hangs", "deepspeed", ["--engine.longest-step", "10"], "rank 0, 1 (--engine.longest-step)", 1),
        ("elsewhere", "torchrun.py", [], "the run folder run of rank 0 is not there for rank 1 on", 2),
    ],
)
def test_what_goes_wrong_on_rank_1_is_said_once_by_rank_0(
    fault: str, launcher: str, options: list[str], words: str, code: int, data: str, tmp_path: Path
) -> None:
    job = start(
        launcher, "--data", data, "--run-dir", "run", *ENDLESS, "--loop.report-every", "1", *options,
        cwd=tmp_path, script=SCRIPT, options=[fault, *OPTIONS],
    )  # fmt: skip
    output = finish(job, expect=code)
    said = errors_in(output)
    assert len(said) == 1 and words in said[0], output
    assert words in (tmp_path / "run" / "train.log").read_text()
    if fault == "hangs":
        assert "time.sleep(3600)" in (tmp_path / "run" / "logs" / "rank_1.log").read_text()


def test_a_signal_to_one_rank_that_is_set_up_ends_all(data: str, tmp_path: Path) -> None:
    """Rank 0, which keeps the ranks' store, has it alone."""
    job = start(
        "deepspeed", "--data", data, "--run-dir", "run", cwd=tmp_path, script=SCRIPT, options=["told", *OPTIONS]
    )
    output = finish(job, expect=143)
    said = errors_in(output)
    assert len(said) == 1 and "told to stop while no step was under way; nothing is saved" in said[0], output
    assert not (tmp_path / "run").exists()


def test_torchrun_restarts_it_again_and_again_in_its_own_folder(
    data: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchrun = [str(BINARIES / "torchrun"), "--standalone", "--nproc_per_node", "2", "--max-restarts", "2"]
    monkeypatch.setitem(LAUNCHERS, "restarting", torchrun)
    finish(start("restarting", "--data", data, cwd=tmp_path, script=SCRIPT, options=["dies", *OPTIONS]))
    (folder,) = (tmp_path / "runs").glob("*")
    assert losses(folder) == losses(whole)
    assert status_of(folder) == ("FINISHED", 0)
    assert len(json.loads((folder / "environment.json").read_text())) == 3


def test_mlflow_that_never_answers_does_not_keep_a_told_run(data: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        options = [*OPTIONS, "--data", data, "--run-dir", "run", *ENDLESS, "--loop.grace", "20"]
        uri = f"http://127.0.0.1:{hole.getsockname()[1]}"
        job = spawn([*LAUNCHERS["single"], TRAIN, *options], cwd=tmp_path, MLFLOW_TRACKING_URI=uri)
        wait_for_step(job, tmp_path / "run", 4)
        job.send_signal(signal.SIGINT)
        output = finish(job, expect=130)
    assert "error: told to stop after step" in output  # by itself, and not by the end of its grace period
    assert "Traceback" not in output
    assert len(set(saved_steps(tmp_path / "run"))) == 1


def test_fewer_ranks_take_more_micro_batches_and_give_the_same_numbers(data: str, whole: Path, tmp_path: Path) -> None:
    ours = tmp_path / "run"
    shutil.copytree(whole, ours, symlinks=True, ignore=shutil.ignore_patterns("mlflow*", "model", "step_8"))
    output = run("single", "--data", data, "--run-dir", "run", cwd=tmp_path)
    assert "from step 6" in output
    assert "--optim.accumulation 2 (micro-batches no larger than before, on 1 ranks)" in output
    assert losses(ours) == losses(whole)
