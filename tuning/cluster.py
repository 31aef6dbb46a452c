"""Where trials run: a Ray started here or one that is there already, and what each trial gets of it."""

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from infra.errors import UserError
from tuning.config import SearchConfig

CONNECT_S = 5.0
WATCH_S = 5.0
RAY_DIED = 4  # exit code
# Before Ray is imported. Trials write into the folders that they are given.
ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # less than a trial takes to begin: a kill loses none
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass(frozen=True)
class Machine:
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Share:
    """What each rank of a trial gets, and how many trials run at once."""

    ranks: int
    cpus: float
    gpus: float
    concurrent: int


def this_machine() -> Machine:
    import torch

    return Machine(len(os.sched_getaffinity(0)), torch.cuda.device_count())


def share_out(search: SearchConfig, machines: Sequence[Machine]) -> Share:
    """UserError if not one trial finds room. CPUs beyond one a rank are given where --max-concurrent leaves them over
    and no GPU does the work."""
    cpus, gpus = sum(m.cpus for m in machines), sum(m.gpus for m in machines)
    ranks = search.ranks_per_trial
    wanted = search.gpus_per_trial if search.gpus_per_trial is not None else ranks * min(gpus, 1)
    per_rank = wanted / ranks
    if wanted > gpus:
        raise UserError(f"{wanted:g} GPUs per trial, {gpus:g} found: give a lower --gpus-per-trial, 0 for the CPU")
    if per_rank > max(m.gpus for m in machines):
        raise UserError(f"{per_rank:g} GPUs per rank are more than any machine has: give a lower --gpus-per-trial")
    if per_rank > 1 or (per_rank % 1 and ranks > 1):
        raise UserError(
            f"{wanted:g} GPUs for {ranks} ranks: give one GPU to each rank, or less than one to a single rank"
        )
    if ranks > cpus:
        raise UserError(f"{ranks} ranks per trial, {cpus:g} CPUs found: give a lower --ranks-per-trial")
    room = int(cpus // ranks) if not wanted else min(int(cpus // ranks), int(gpus / wanted + 1e-9))
    concurrent = min(room, search.max_concurrent or room)
    each = 1.0 if wanted else float(max(1, min(m.cpus for m in machines) // (concurrent * ranks)))
    return Share(ranks, each if search.max_concurrent else 1.0, per_rank, concurrent)


@contextmanager
def connected(search: SearchConfig) -> Iterator[list[Machine]]:
    """With Ray running, and the machines that it has. UserError for a cluster that does not answer."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if search.address:
        _check_address(search.address)
    ours = not ray.is_initialized()
    if ours:
        _start(search)
    stop = threading.Event()
    threading.Thread(target=_watch, args=(stop,), daemon=True).start()
    try:
        yield [
            Machine(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
            for node in ray.nodes() if node["Alive"]
        ]  # fmt: skip
    finally:
        stop.set()
        if ours:
            ray.shutdown()


def _watch(stop: threading.Event) -> None:
    """End the program when Ray's own process on this machine is gone, for which Tune would wait without end."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    while not stop.wait(WATCH_S):
        if not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == here):
            print("error: Ray has died under the search: continue it with --resume", file=sys.stderr, flush=True)
            os._exit(RAY_DIED)


def _start(search: SearchConfig) -> None:
    import ray

    logging.getLogger("ray").setLevel(logging.CRITICAL)  # the search tells of its trials itself
    settings: dict[str, Any] = {
        "log_to_driver": False,
        "runtime_env": {"env_vars": ENVIRONMENT},
        "configure_logging": False,
    }
    try:
        if search.address:
            ray.init(address=search.address, **settings)
        else:
            machine = this_machine()
            ray.init(
                address="local", num_cpus=int(machine.cpus), num_gpus=int(machine.gpus),
                include_dashboard=search.dashboard, **settings,
            )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"Ray cannot be reached or started ({line}): check --address, or leave it out") from None


def _check_address(address: str) -> None:
    """Ray itself waits for minutes."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise UserError(
            f"--address {address!r} is no HOST:PORT: give that of the cluster's head, such as head:6379, or auto"
        )
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise UserError(f"no Ray cluster answers at {address} ({error.strerror or error}): check --address, or leave it "
                        "out to start Ray here") from None  # fmt: skip
