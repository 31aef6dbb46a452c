"""Whole searches: on a cluster of two nodes, with failures, schedulers and several ranks; and after SIGKILL."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from infra.config import read_yaml, to_yaml
from infra.errors import UserError
from infra.storage import open_storage
from launch.runs.config import make_config
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import street_scenes
from tuning.config import parse_arguments
from tuning.driver import search
from tuning.folder import SearchFolder

SEARCH = Path(__file__).parents[2] / "tuning" / "search.py"
TINY = [
    "--crop", "32", "--data.decoder", "pillow", "--ngf", "2", "--ndf", "2", "--method.generator.blocks", "6",
    "--method.head-dim", "4", "--method.taps", "0,4", "--method.patches", "8", "--method.buffer", "2",
    "--precision", "fp32", "--loop.samples", "1", "--loop.report-every", "4",
    "--optim.epochs", "1", "--optim.decay-epochs", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with data; its MLflow store is a file."""
    folder = tmp_path_factory.mktemp("searches")
    prepare(street_scenes(8, 2), open_storage(str(folder / "data")), Encoding((64, 32)), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


@pytest.fixture(scope="module")
def cluster(place: Path) -> Iterator[str]:
    """The address of two nodes on this machine, with a CPU each."""
    from tuning.cluster import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes.address
    ray.shutdown()
    nodes.shutdown()


def run(*arguments: str, cluster: str, name: str) -> tuple[SearchFolder, str]:
    text = search(parse_arguments(["--data", "data", *TINY, "--address", cluster, "--name", name, *arguments]))
    return SearchFolder.named(name), text


def starts(folder: SearchFolder, number: int) -> int:
    """How often a trial's job was started."""
    return len(json.loads((folder.run_dir(number) / "environment.json").read_text()))


def test_trials_on_both_nodes_and_one_that_fails(cluster: str, place: Path) -> None:
    folder, text = run("--space", "optim.lr=choice(1e-4,2e-4,1e30)", cluster=cluster, name="nodes")
    records = folder.records()
    assert [record.status for record in records] == ["finished", "finished", "failed"]
    assert "is not a finite number" in records[2].cause
    assert len({record.node for record in records}) == 2

    with folder.csv_file.open() as file:
        assert len(list(csv.DictReader(file))) == 3
    best = make_config(read_yaml(folder.best_file))
    assert best.optim.lr in (1e-4, 2e-4) and best.run_dir is None
    assert folder.landscape_file.read_bytes().startswith(b"\x89PNG")
    assert str(folder.best_file) in text and "mlflow ui" in text
    assert not folder.ray.exists()

    client = MlflowClient(tracking_uri=f"sqlite:///{place}/mlflow.db")
    parent = folder.run_id_file.read_text().strip()
    experiment = client.get_run(parent).info.experiment_id
    assert "1e+30" in client.get_run(parent).data.tags["mlflow.note.content"]  # the table of results
    nested = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert sorted(r.info.status for r in nested) == ["FAILED", "FINISHED", "FINISHED"]
    assert {r.data.params["optim.lr"] for r in nested} == {"0.0001", "0.0002", "1e+30"}
    assert client.get_model_version_by_alias("srunit-gta2city", "best").run_id in {r.info.run_id for r in nested}


def test_pbt_takes_over_weights_and_changes_options(cluster: str) -> None:
    arguments = ["--space", "optim.lr=loguniform(1e-5,1e-2)", "beta-T", "--scheduler", "pbt", "--trials", "2"]
    longer = ["--optim.epochs", "5", "--evaluation.every", "2", "--seed", str(2**40)]
    folder, _ = run(*arguments, *longer, cluster=cluster, name="pbt")
    records = folder.records()
    assert [record.status for record in records] == ["finished", "finished"]
    logs = {record.number: (folder.run_dir(record.number) / "train.log").read_text() for record in records}
    changed = [number for number in logs if starts(folder, number) > 1]
    assert changed  # the lesser half of two
    for number in changed:
        # Not the evaluation after step 16, soon after L_robust has begun with step 13 of 48.
        assert ", from step 32" in logs[number] and ", from step 16" not in logs[number]
        lr = read_yaml(folder.run_dir(number) / "config.yaml")["optim.lr"]
        assert lr == records[number].params["optim.lr"] != pytest.approx(records[1 - number].params["optim.lr"])


def test_two_ranks_in_a_trial_and_asha(cluster: str) -> None:
    arguments = ["--space", "beta-T", "--trials", "1", "--ranks-per-trial", "2", "--scheduler", "asha"]
    folder, _ = run(*arguments, "--global-batch", "2", "--optim.epochs", "2", cluster=cluster, name="ranks")
    (record,) = folder.records()
    assert record.status == "finished", record.cause
    assert "ddp x2" in (folder.run_dir(0) / "train.log").read_text()


# ---- SIGKILL --------------------------------------------------------------------------------------------------------


def begin(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SEARCH), *arguments]
    return subprocess.Popen(
        command, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def process_of(job: subprocess.Popen[str], beginning: str) -> psutil.Process:
    """The one process under a search whose title begins so."""
    below = psutil.Process(job.pid).children(recursive=True)
    titles = {process: " ".join(process.cmdline()) for process in below}
    (found,) = [process for process, title in titles.items() if title.startswith(beginning)]
    return found


def wait_for(condition: Any, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if condition():
            return
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("it did not come to that")


def test_a_killed_search_goes_on(place: Path) -> None:
    """First the process of a trial is killed, which its own search survives; then the search."""
    folder = SearchFolder.named("killed")
    options = ["--data", "data", *TINY, "--optim.epochs", "8", "--evaluation.every", "1", "--max-concurrent", "1"]
    job = begin(*options, "--space", "optim.lr=choice(1e-4,2e-4)", "--name", "killed")

    def evaluated(number: int) -> bool:
        file = folder.run_dir(number) / "checkpoints"
        return any(file.glob("step_*/manifest.json"))

    wait_for(lambda: evaluated(0), job)
    process_of(job, "ray::ImplicitFunc").kill()
    wait_for(lambda: folder.records()[0].status == "finished" and evaluated(1), job)
    job.kill()  # and nothing else: what it started dies of that
    job.communicate()
    assert [record.status for record in folder.records()] == ["finished", "running"]
    assert starts(folder, 0) == 2

    again = begin("--resume", "killed")
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert [record.status for record in folder.records()] == ["finished"] * 2
    assert [starts(folder, number) for number in range(2)] == [2, 2]
    for number in range(2):
        steps = [json.loads(line)["step"] for line in (folder.run_dir(number) / "metrics.jsonl").open()]
        assert steps == list(range(1, 73))


def test_a_search_is_run_by_one_process(place: Path) -> None:
    folder = SearchFolder.named("held")
    folder.trials.mkdir(parents=True)
    folder.request_file.write_text(to_yaml(parse_arguments(["--data", "data", *TINY]).flat()))
    with folder.lock(), pytest.raises(UserError, match="held is running in another process"):
        search(parse_arguments(["--resume", "held"]))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--space", "optim.lrr=uniform(0,1)"], "did you mean 'optim.lr'"),
        (["--gpus-per-trial", "4"], "4 GPUs per trial, 0 found"),
        (["--resume", "nobody"], "no search runs/search-nobody"),
        (["--address", "127.0.0.1:1"], "no Ray cluster answers"),
        (["--data", "data", "--metric", "mIoU"], "nothing to evaluate evaluation.best = mIoU"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "data", "--scheduler", "asha", "--evaluation.every", "10"], "at 25% of the epochs"),
    ],
)
def test_bad_input_is_one_sentence_at_once(arguments: list[str], complaint: str, place: Path) -> None:
    before = time.monotonic()
    job = begin(*arguments)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2 and time.monotonic() - before < 30
    assert output.startswith("error: ") and complaint in output and output.count("\n") == 1
    assert not list(Path("runs").glob("search-beta*"))
