"""Fixtures for all tests: a real S3 server on this machine, and the folder of real images where there is one."""

import os
import signal
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest

from tests.faulty_s3 import FaultyS3, faulty_s3
from tests.local_s3 import local_s3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"end_to_end", "parity"} & set(item.path.parts):
            item.add_marker("slow")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A job in the background of a shell ignores Ctrl-C, and so would everything that the tests start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_rank() -> Iterator[None]:
    """A process that was a rank, and still says so in its environment, makes ranks of all that later tests start."""
    yield
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & os.environ.keys()


@dataclass(frozen=True)
class S3Server:
    """A running server, which the AWS_* variables already point at."""

    endpoint: str

    def make_bucket(self) -> str:
        """The name of a new, empty bucket."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        boto3.session.Session().client("s3").create_bucket(Bucket=name)
        return name


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """rclone's S3 server on a free port of 127.0.0.1, with the usual AWS_* variables set to reach it."""
    with local_s3(tmp_path_factory.mktemp("s3")):
        yield S3Server(os.environ["AWS_ENDPOINT_URL"])


@pytest.fixture
def faulty_server(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A proxy in front of the S3 server that injects the faults it is told, at which AWS_ENDPOINT_URL points."""
    with faulty_s3(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images (SHARED_DATA, by default ../shared/data); the test is skipped where it is absent."""
    repository = Path(__file__).parents[1]
    folder = Path(os.environ.get("SHARED_DATA", repository.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}")
    return folder
