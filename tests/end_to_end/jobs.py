"""Whole training jobs as a person starts them, small enough for a test: processes, launchers, files, exit codes."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file
from torch import Tensor

from infra.storage import open_storage
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import street_scenes

REPOSITORY = Path(__file__).parents[2]
TRAIN = str(REPOSITORY / "launch" / "train.py")
BINARIES = Path(sys.executable).parent

# Everything that has state is on: image buffer, moving average, L_robust from the start.
OPTIONS = [
    "--task", "gta2city", "--crop", "32", "--ngf", "4", "--ndf", "4", "--method.head-dim", "8",
    "--method.patches", "16", "--method.buffer", "4", "--method.robust.start", "0", "--optim.ema", "0.9",
    "--global-batch", "2", "--precision", "fp32", "--max-steps", "8", "--loop.checkpoint-every", "3",
    "--loop.report-every", "1", "--loop.samples-every", "4", "--loop.samples", "2",
]  # fmt: skip

LAUNCHERS = {
    "single": [sys.executable],
    "ddp": [str(BINARIES / "torchrun"), "--standalone", "--nproc_per_node", "2"],
    "torchrun.py": [
        sys.executable,
        str(REPOSITORY / "launch" / "torchrun.py"),
        "--standalone",
        "--nproc_per_node",
        "2",
    ],
    "deepspeed": [str(BINARIES / "deepspeed"), "--num_accelerators", "2", "--master_port"],
}


def small_data(root: str) -> str:
    """Prepare 7 training and 3 test scenes of 64x32 in shards of 4; returns the root."""
    prepare(street_scenes(count=7, test_count=3), open_storage(root), Encoding((64, 32), shard_size=4), progress=False)
    return root


def start(
    launcher: str, *arguments: str, cwd: Path, script: str = TRAIN, options: Sequence[str] = OPTIONS
) -> subprocess.Popen[str]:
    """Start a job with `options` and more."""
    command = [*LAUNCHERS[launcher], *([str(free_port())] if launcher == "deepspeed" else [])]
    return spawn([*command, script, *options, *arguments], cwd=cwd)


def spawn(command: Sequence[str], *, cwd: Path, **variables: str) -> subprocess.Popen[str]:
    """Start a command; one thread per rank, so that arithmetic is cut up alike in each. variables: of its environment."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{BINARIES}{os.pathsep}{environment['PATH']}"
    environment.pop("MLFLOW_TRACKING_URI", None)
    environment |= variables
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def finish(job: subprocess.Popen[str], expect: int = 0) -> str:
    """Wait for a job; returns what it printed. One that hangs is killed and fails the test with what it printed."""
    try:
        output, _ = job.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end after 600 s: {kill(job)}") from None
    assert job.returncode == expect, output
    return output


def run(launcher: str, *arguments: str, cwd: Path, expect: int = 0) -> str:
    return finish(start(launcher, *arguments, cwd=cwd), expect)


def wait_for_step(job: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """Until the job has written the metrics of a step."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        metrics = run_dir / "metrics.jsonl"
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def kill(job: subprocess.Popen[str]) -> str:
    """SIGKILL to the launcher and all ranks at once; returns what they printed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        # The deepspeed launcher puts its ranks into sessions of their own.
        for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
            process.kill()
    return job.communicate()[0]


def losses(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of every step, without what depends on the machine's speed and on where the data lies."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    others = ("pairs_per_s", "memory_gib", "data/", "save/", "time")
    return [{k: v for k, v in row.items() if not k.startswith(others)} for row in rows]


def weights(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: networks, optimiser, moving average, image buffers."""
    folder = run_dir / "checkpoints" / f"step_{step}"
    return {
        f"{file.stem}/{name}": value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }
