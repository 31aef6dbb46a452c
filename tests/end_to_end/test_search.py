"""Whole searches: on a cluster of two nodes, with failures, schedulers and several ranks; and after SIGKILL."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from infra import ray_cluster
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


def trials(folder: SearchFolder) -> list[dict[str, str]]:
    """The lines of trials.csv."""
    with folder.csv_file.open() as file:
        return list(csv.DictReader(file))


def starts(folder: SearchFolder, number: int) -> int:
    """How often a trial's job was started."""
    return len(json.loads((folder.run_dir(number) / "environment.json").read_text()))


def test_trials_on_both_nodes_and_one_that_fails(cluster: str, place: Path) -> None:
    folder, text = run("--space", "optim.lr=choice(1e-4,2e-4,1e30)", cluster=cluster, name="nodes")
    ended = trials(folder)
    assert [trial["status"] for trial in ended] == ["finished", "finished", "failed"]
    assert "is not a finite number" in ended[2]["cause"]
    assert len({trial["node"] for trial in ended}) == 2
    best = make_config(read_yaml(folder.best_file))
    assert best.optim.lr in (1e-4, 2e-4) and best.run_dir is None
    assert folder.landscape_file.read_bytes().startswith(b"\x89PNG")
    assert str(folder.best_file) in text and "mlflow ui" in text

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
    longer = ["--optim.epochs", "2", "--evaluation.every", "1.5", "--method.robust.start", "0", "--seed", str(2**40)]
    folder, _ = run(*arguments, *longer, cluster=cluster, name="pbt")
    ended = trials(folder)
    assert [trial["status"] for trial in ended] == ["finished", "finished"]
    assert not list(folder.ray.rglob("*.safetensors"))  # what they could take over is not kept
    runs = [folder.run_dir(number) for number in range(2)]
    assert all(", from step 12" in (run_dir / "train.log").read_text() for run_dir in runs)
    first = [(run_dir / "evaluations.jsonl").read_text().splitlines()[0] for run_dir in runs]
    assert first[0] == first[1]  # the lesser one has the weights of the better one, and with them its evaluation
    begun = re.findall(r"trial (\d)/2 begins: lr (\S+),", folder.log_file.read_text())
    assert sorted(len({lr for trial, lr in begun if trial == number}) for number in "12") == [1, 2]
    for run_dir, trial in zip(runs, ended, strict=True):
        assert read_yaml(run_dir / "config.yaml")["optim.lr"] == float(trial["optim.lr"])
    assert float(ended[0]["optim.lr"]) != pytest.approx(float(ended[1]["optim.lr"]))


def test_two_ranks_in_a_trial_and_asha(cluster: str) -> None:
    arguments = ["--space", "beta-T", "--trials", "1", "--ranks-per-trial", "2", "--scheduler", "asha"]
    folder, _ = run(*arguments, "--global-batch", "2", "--optim.epochs", "2", cluster=cluster, name="ranks")
    (trial,) = trials(folder)
    assert trial["status"] == "finished", trial["cause"]
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
    options = ["--data", "data", *TINY, "--optim.epochs", "3", "--evaluation.every", "1", "--max-concurrent", "1"]
    space = ["--space", "optim.lr=choice(1e-4,2e-4)", "method.robust.taps=choice((0,4))"]
    job = begin(*options, *space, "--name", "killed")

    def evaluated(number: int) -> bool:
        file = folder.run_dir(number) / "checkpoints"
        return any(file.glob("step_*/manifest.json"))

    wait_for(lambda: evaluated(0), job)
    process_of(job, "ray::ImplicitFunc").kill()
    wait_for(lambda: (folder.run_dir(0) / "model").exists() and evaluated(1), job)
    job.kill()  # and nothing else: what it started dies of that
    job.communicate()
    assert starts(folder, 0) == 2 and not folder.csv_file.exists()

    again = begin("--resume", "killed")
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    ended = trials(folder)
    assert [(trial["status"], trial["optim.lr"], trial["step"]) for trial in ended] == [
        ("finished", "0.0001", "32"), ("finished", "0.0002", "32")
    ]  # fmt: skip
    assert all(float(trial["Dist"]) > 0 for trial in ended)
    assert [starts(folder, number) for number in range(2)] == [2, 2]
    for number in range(2):
        steps = [json.loads(line)["step"] for line in (folder.run_dir(number) / "metrics.jsonl").open()]
        assert steps == list(range(1, 33))


def test_a_search_is_run_by_one_process(place: Path) -> None:
    folder = SearchFolder.named("held")
    folder.trials.mkdir(parents=True)
    folder.request_file.write_text(to_yaml(parse_arguments(["--data", "data", *TINY]).flat()))
    with folder.lock(), pytest.raises(UserError, match="held is running in another process"):
        search(parse_arguments(["--resume", "held"]))


def test_bad_input_is_one_sentence_at_once(place: Path) -> None:
    job = begin("--space", "optim.lrr=uniform(0,1)")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert output.startswith("error: ") and "did you mean 'optim.lr'" in output and output.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--gpus-per-trial", "4"], "4 GPUs per trial, 0 found"),
        (["--resume", "nobody"], "no search runs/search-nobody"),
        (["--address", "127.0.0.1:1"], "no Ray cluster answers"),
        (["--data", "data", "--metric", "mIoU"], "nothing to evaluate evaluation.best = mIoU"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "data", "--scheduler", "asha", "--evaluation.every", "10"], "at 25% of the epochs"),
    ],
)
def test_bad_input_is_found_before_ray_starts(
    arguments: list[str], complaint: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "_start", None)
    with pytest.raises(UserError, match=complaint):
        search(parse_arguments(arguments))
    assert not list(Path("runs").glob("search-beta*"))
