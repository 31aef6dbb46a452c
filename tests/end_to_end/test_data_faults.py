"""Runs whose store or data is not in order: the same weights, or others in the places of what is left out."""

import json
from pathlib import Path

import pytest
import torch

from infra.storage import open_storage
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import street_scenes
from tests.conftest import S3Server
from tests.end_to_end.jobs import losses, run, weights
from tests.faulty_s3 import FaultyS3, now_and_then
from tests.pipelines.shardmaker import break_samples

STEPS = 8


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A prepared data set of four shards in each domain."""
    root = tmp_path / "data"
    prepare(
        street_scenes(count=7, test_count=3), open_storage(str(root)), Encoding((64, 32), shard_size=2), progress=False
    )
    return root


def test_a_store_that_is_busy_at_30_percent_of_the_requests_changes_no_weight(
    s3_server: S3Server, faulty_server: FaultyS3, data: Path, tmp_path: Path
) -> None:
    remote = open_storage(f"s3://{s3_server.make_bucket()}/scenes")
    for path in data.rglob("*.*"):
        remote.upload(path, path.relative_to(data).as_posix())
    run("single", "--data", "data", "--run-dir", "disk", cwd=tmp_path)

    faulty_server.faults = now_and_then("busy", 0.3)
    run("single", "--data", remote.url, "--data.cache-dir", "cache", "--run-dir", "s3", cwd=tmp_path)
    assert losses(tmp_path / "s3") == losses(tmp_path / "disk")
    ours, theirs = weights(tmp_path / "s3", STEPS), weights(tmp_path / "disk", STEPS)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)

    last = _last_row(tmp_path / "s3")
    assert last["data/retries"] > 0 and last["data/fetched_MiB"] > 0
    assert not {"data/bad_samples", "data/bad_shards"} & last.keys()
    assert {name for name in _last_row(tmp_path / "disk") if name.startswith("data/")} == {"data/wait"}


def test_what_is_left_out_is_named_counted_and_reported_at_the_end(data: Path, tmp_path: Path) -> None:
    break_samples(data, "000002-world-1000002")
    (data / "train/source/000001.tar").unlink()
    output = run("single", "--data", "data", "--run-dir", "run", cwd=tmp_path, expect=2)
    assert "error: data/train/source/000001.tar is missing" in output
    assert "Traceback" not in output

    run("ddp", "--data", "data", "--run-dir", "run", "--on-bad-sample", "skip", "--on-bad-shard", "skip", cwd=tmp_path)
    last = _last_row(tmp_path / "run")
    assert last["step"] == STEPS and last["data/bad_samples"] == 1 and last["data/bad_shards"] == 1
    log = (tmp_path / "run" / "train.log").read_text()
    assert "1 sample and 1 shard were skipped, others took their places: " in log


def _last_row(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
