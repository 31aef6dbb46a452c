"""Work dealt to the workers of a Ray cluster: what comes back, what a death costs, and the same bytes as on one machine."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from infra.errors import Stopped, UserError
from infra.ray_cluster import Machine, connected
from infra.ray_work import deal
from infra.storage import LocalStorage, open_storage
from launch import prepare as prepare_cli
from pipelines.derived import Part, derive, encoding_of
from pipelines.manifest import load_manifest
from pipelines.prepare import Encoding, prepare
from pipelines.shards import Sample
from pipelines.sources.drawn import street_scenes
from tests.launch.translating import contents, make_run, refused, translate

pytestmark = pytest.mark.slow

TWO = [Machine(1, 0), Machine(1, 0)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of two nodes on this machine, with a CPU each, to which this process is connected."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # which workers cannot import
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    with connected(nodes.address, lost="the test ends"):
        yield nodes.address
    nodes.shutdown()
    assert not ray.is_initialized()


def kill_when(file: Path) -> threading.Thread:
    """Kill the process whose id a file will have."""

    def wait() -> None:
        while not (file.exists() and file.read_text()):
            time.sleep(0.02)
        os.kill(int(file.read_text()), signal.SIGKILL)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


class Work:
    """Squares. fatal: of this job the worker is killed, the first time (once) or each. workers: how many there must be before
    the first job is done."""

    def __init__(self, folder: Path, fatal: int = -1, once: bool = True, workers: int = 1) -> None:
        self.folder, self.fatal, self.once, self.workers = folder, fatal, once, workers

    def __call__(self, job: int) -> tuple[int, int]:
        (self.folder / f"worker-{os.getpid()}").touch()
        while len(list(self.folder.glob("worker-*"))) < self.workers:
            time.sleep(0.02)
        with (self.folder / "done").open("a") as file:
            file.write(f"{job} ")
        if job == self.fatal:
            if not self.once:
                os._exit(1)
            if not (self.folder / "pid").exists():
                (self.folder / "pid").write_text(str(os.getpid()))
                time.sleep(60)
        return job * job, os.getpid()


def test_results_come_in_order_from_several_workers(address: str, tmp_path: Path) -> None:
    found = list(deal(Work(tmp_path, workers=2), range(8), TWO))
    assert [result for result, _ in found] == [job * job for job in range(8)]
    workers = {process for _, process in found}
    assert len(workers) == 2 and os.getpid() not in workers
    assert sorted((tmp_path / "done").read_text().split()) == [str(job) for job in range(8)]  # each once


@pytest.mark.parametrize("together", [1, 2])
def test_a_killed_workers_jobs_are_done_again(
    address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, together: int
) -> None:
    kill_when(tmp_path / "pid")
    found = list(deal(Work(tmp_path, fatal=3), range(8), TWO, together=together))
    assert [result for result, _ in found] == [job * job for job in range(8)]
    assert (tmp_path / "pid").read_text() not in {str(process) for _, process in found[3:4]}
    assert (tmp_path / "done").read_text().split().count("3") == 2
    assert [record.getMessage()[:16] for record in caplog.records] == ["a worker is lost"]


def test_a_job_that_ends_every_worker_is_named(address: str, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="^0 ended 3 workers one after the other "):
        list(deal(Work(tmp_path, fatal=0, once=False), range(4), TWO))
    assert (tmp_path / "done").read_text().split().count("0") == 3


def warn_and_complain(job: int) -> int:
    logging.getLogger("pipelines.health").warning("bad %s %d", "sample", job)
    if job == 2:
        raise UserError("job 2 cannot be done: leave it out")
    return job


def test_warnings_and_complaints_come_here(address: str, caplog: pytest.LogCaptureFixture) -> None:
    assert list(deal(warn_and_complain, [0, 1], TWO)) == [0, 1]
    assert sorted(record.getMessage() for record in caplog.records) == ["bad sample 0", "bad sample 1"]
    with pytest.raises(UserError, match="^job 2 cannot be done: leave it out$"):
        list(deal(warn_and_complain, [2], TWO))


class Refusing:
    """What no worker can be given."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os._exit, (1,)

    def __call__(self, job: int) -> int:
        return job


def test_workers_that_do_not_start(address: str) -> None:
    with pytest.raises(Stopped, match="^workers do not start on Ray "):
        list(deal(Refusing(), [0], TWO))


# ---- preparing and translating ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Seven scenes a domain, in shards of two."""
    folder = tmp_path_factory.mktemp("data") / "root"
    encoding = Encoding((64, 32), format="png", shard_size=2)
    prepare(street_scenes(7, 2), open_storage(str(folder)), encoding, progress=False)
    return str(folder)


def test_a_root_is_prepared_with_the_bytes_of_one_machine(
    address: str, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = "prepare.py street-scenes --count 7 --test-count 2 --size 64x32 --format png --shard-size 2 --out out"
    monkeypatch.setattr(sys, "argv", [*line.split(), "--address", address])
    prepare_cli.main()
    assert contents(tmp_path / "out") == contents(Path(root))


def test_files_named_from_here_are_found_by_workers(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    """Which work in another folder."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for side in "AB":
        place = Path(f"photos/train{side}")
        place.mkdir(parents=True)
        Image.new("RGB", (40, 30), "red" if side == "A" else "blue").save(place / "1.png")
    for out, more in (("here", ["--workers", "1"]), ("there", ["--address", address])):
        monkeypatch.setattr(sys, "argv", f"prepare.py folders photos --size 32x32 --out {out}".split() + more)
        prepare_cli.main()
    assert contents(Path("here")) == contents(Path("there")) != {}


def test_a_root_is_translated_with_the_bytes_of_one_machine(
    address: str, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run", "munit")
    assert translate(monkeypatch, run, root, "here") == 0
    assert translate(monkeypatch, run, root, "there", "--address", address) == 0
    assert contents(Path("there")) == contents(Path("here"))


class Elsewhere(LocalStorage):
    """A folder that each machine has of its own."""

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"root": self.root.with_name("elsewhere")}


def test_an_output_that_machines_do_not_share_is_told(address: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="train/source/000000.tar is not there, though it was made: name an output that all"
    ):
        prepare(street_scenes(1, 0), Elsewhere(tmp_path / "out"), Encoding((32, 32)), progress=False, address=address)
    assert not (tmp_path / "out/manifest.json").exists()


class DiesOnce:
    """Turns samples upside down; while the first is done its process is killed."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, samples: list[Sample]) -> list[Sample]:
        if not self.file.exists():
            self.file.write_text(str(os.getpid()))
            time.sleep(60)
        return [Sample(each.key, each.image.rotate(180), each.label, each.origin) for each in samples]


def test_a_shard_whose_worker_is_killed_is_made_by_another(address: str, root: str, tmp_path: Path) -> None:
    storage = open_storage(root)
    manifest, file = load_manifest(storage), tmp_path / "pid"

    def make(out: str, address: str | None) -> dict[str, bytes]:
        parts = {"train/source": [Part(storage, manifest.splits["train/source"], DiesOnce(file), "upside down")]}
        derive(parts, open_storage(out), encoding_of(manifest), {"source": "test"}, address=address, progress=False)
        return contents(Path(out))

    killing = kill_when(file)
    there = make(str(tmp_path / "there"), address)
    assert not killing.is_alive()
    assert make(str(tmp_path / "here"), None) == there
    assert len(there) > 8


def test_what_cannot_be_dealt(
    address: str, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    for line, words in (
        ((run, tmp_path, out / "a", "--address", address), "deals out the shards of prepared data"),
        ((run, root, out / "a", "--address", "head"), "'head' is no HOST:PORT"),
        ((run, root, out / "a", "--address", "127.0.0.1:1"), "no Ray cluster answers at 127.0.0.1:1"),
    ):
        assert words in refused(monkeypatch, capsys, out, *line)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start the command without torchrun or deepspeed"):
        from launch.translate import parser
        from launch.translating.inputs import translate as work

        work(parser().parse_args([str(run), root, str(out / "a"), "--address", address]))
    assert not list(out.iterdir())
