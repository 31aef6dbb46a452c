"""One training on two nodes, which are two names of this machine: by two agents of torchrun, and by the deepspeed launcher over
ssh. Both end like one process that takes the two pairs of a step one after the other."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.end_to_end.jobs import (
    BINARIES,
    OPTIONS,
    REPOSITORY,
    TRAIN,
    finish,
    free_port,
    kill,
    losses,
    run,
    small_data,
    spawn,
    wait_for_step,
    weights,
)

STEPS = 8
FAULTY = str(Path(__file__).with_name("faulty_rank.py"))
TORCHRUN = str(REPOSITORY / "launch" / "torchrun.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small prepared data set, on disk."""
    return small_data(str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def one_process(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    run("single", "--optim.accumulation", "2", "--data", data, "--run-dir", "run", cwd=folder)
    return folder / "run"


def assert_same(run_dir: Path, reference: Path) -> None:
    for row, expected in zip(losses(run_dir), losses(reference), strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=0)
    ours, theirs = weights(run_dir, STEPS), weights(reference, STEPS)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def start_node(
    number: int,
    port: int,
    arguments: list[str],
    cwd: Path,
    restarts: int = 0,
    patience: int = 60,
    script: Sequence[str] = (TRAIN,),
) -> subprocess.Popen[str]:
    """An agent of torchrun with one rank. The first node keeps the store by which they find each other. patience: seconds for
    the store to answer."""
    launcher = [
        "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}",
        "--rdzv-conf", f"is_host={int(number == 0)},read_timeout={patience}", "--local-addr", "127.0.0.1",
        "--max-restarts", str(restarts),
    ]  # fmt: skip
    return spawn([sys.executable, TORCHRUN, *launcher, *script, *OPTIONS, *arguments], cwd=cwd)


def test_two_agents_of_torchrun(data: str, one_process: Path, tmp_path: Path) -> None:
    port = free_port()
    nodes = [start_node(number, port, ["--data", data, "--run-dir", "run"], tmp_path) for number in (0, 1)]
    for node in nodes:
        finish(node)
    assert_same(tmp_path / "run", one_process)


def test_a_node_that_dies_and_comes_back_goes_on(data: str, one_process: Path, tmp_path: Path) -> None:
    """It is back before torchrun has missed it. The first node, which keeps the store, goes on with both."""
    port, run_dir = free_port(), tmp_path / "run"
    own = partial(start_node, port=port, arguments=["--data", data, "--run-dir", "run"], cwd=tmp_path, restarts=3,
                  script=(FAULTY, "on_a_node_of_its_own"))  # fmt: skip
    first, second = own(0), own(1)
    wait_for_step(first, run_dir, 4)
    kill(second)
    for node in (first, own(1)):
        finish(node)
    assert_same(run_dir, one_process)
    assert len(json.loads((run_dir / "environment.json").read_text())) > 1


def test_a_mistake_on_two_nodes_has_its_exit_code(tmp_path: Path) -> None:
    """torchrun itself would end with 1. The node that still starts when the first goes may lose it before it has the mistake."""
    port = free_port()
    first, second = (start_node(number, port, ["--method", "nothing"], tmp_path) for number in (0, 1))
    assert "error: unknown method" in finish(first, expect=2)
    second.communicate(timeout=300)
    assert second.returncode in (2, 75)


def test_an_agent_that_is_alone_ends_with_an_outage(tmp_path: Path) -> None:
    node = start_node(1, free_port(), ["--method", "nothing"], tmp_path, patience=5)
    assert "error: another machine is not there" in finish(node, expect=75)


@contextmanager
def ssh_server(folder: Path) -> Iterator[dict[str, str]]:
    """An sshd on 127.0.0.1 that lets this user in with a key of its own; gives the port and what pdsh has to add to ssh."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    missing = [name for name in ("ssh", "ssh-keygen", "pdsh") if not shutil.which(name)]
    missing += [] if sshd else ["sshd"]
    if missing or sshd is None:
        pytest.skip(f"the deepspeed launcher needs {', '.join(missing)}: apt install openssh-server pdsh")
    if os.geteuid() == 0:
        with suppress(OSError):
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # where root's sshd locks its unprivileged part in
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    port = str(free_port())
    # A login has an environment of its own, as on another machine.
    settings = [
        f"HostKey={folder / 'host'}", f"AuthorizedKeysFile={folder / 'authorized_keys'}", "ListenAddress=127.0.0.1",
        f"Port={port}", "PidFile=none", "StrictModes=no", "UsePAM=no",
        f"SetEnv=OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PATH={BINARIES}:{os.environ['PATH']}",
    ]  # fmt: skip
    options = [word for setting in settings for word in ("-o", setting)]
    with (folder / "sshd.log").open("w") as log:
        server = subprocess.Popen([sshd, "-D", "-e", "-f", "/dev/null", *options], stderr=log)
    added = f"-i {folder / 'user'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    try:
        for _ in range(100):
            command = ["ssh", *added.split(), "-o", "BatchMode=yes", "-p", port, "localhost", "true"]
            if subprocess.run(command, capture_output=True).returncode == 0:
                break
            assert server.poll() is None, (folder / "sshd.log").read_text()
            time.sleep(0.1)
        else:
            raise AssertionError((folder / "sshd.log").read_text())
        yield {"port": port, "PDSH_SSH_ARGS_APPEND": added}
    finally:
        server.terminate()
        server.wait()


def test_the_deepspeed_launcher_over_ssh(data: str, one_process: Path, tmp_path: Path) -> None:
    (tmp_path / "ssh").mkdir()
    with ssh_server(tmp_path / "ssh") as server:
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
        launcher = [
            str(BINARIES / "deepspeed"), "--hostfile", str(hostfile), "--ssh_port", server["port"], "--no_ssh_check",
            "--master_addr", "127.0.0.1", "--master_port", str(free_port()),
        ]  # fmt: skip
        options = [*OPTIONS, "--data", data, "--run-dir", "run"]
        job = spawn([*launcher, TRAIN, *options], cwd=tmp_path, PDSH_SSH_ARGS_APPEND=server["PDSH_SSH_ARGS_APPEND"])
        output = finish(job)
    assert "127.0.0.1: " in output and "localhost: " in output  # pdsh says which node a line is from
    assert_same(tmp_path / "run", one_process)
