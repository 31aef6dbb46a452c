"""Ray: started here, or a cluster that is there already."""

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from infra.errors import UserError, first_line

CONNECT_S = 5.0
WATCH_S = 5.0
RAY_DIED = 4  # exit code
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True)
class Machine:
    cpus: float
    gpus: float


def this_machine() -> Machine:
    import torch

    return Machine(len(os.sched_getaffinity(0)), torch.cuda.device_count())


@contextmanager
def connected(
    address: str | None, *, lost: str, environment: Mapping[str, str] = ENVIRONMENT, dashboard: bool = False
) -> Iterator[list[Machine]]:
    """With Ray running, and the machines that it has; one that runs in this process already is taken as it is.

    address: HOST:PORT of a cluster's head, or auto; None: Ray is started here. lost: what to do when Ray's own process on this
    machine dies, for which Ray's functions would wait without end; the program then says so and exits with RAY_DIED.
    environment: of Ray and its workers. UserError for a cluster that does not answer.
    """
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    import ray

    if address:
        check_address(address)
    ours = not ray.is_initialized()
    if ours:
        _start(address, environment, dashboard)
    stop = threading.Event()
    threading.Thread(target=_watch, args=(stop, lost), daemon=True).start()
    try:
        yield [
            Machine(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
            for node in ray.nodes() if node["Alive"]
        ]  # fmt: skip
    finally:
        stop.set()
        if ours:
            ray.shutdown()


def _watch(stop: threading.Event, lost: str) -> None:
    import ray

    here = ray.get_runtime_context().get_node_id()
    while not stop.wait(WATCH_S):
        if not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == here):
            print(f"error: Ray has died: {lost}", file=sys.stderr, flush=True)
            os._exit(RAY_DIED)


def _start(address: str | None, environment: Mapping[str, str], dashboard: bool) -> None:
    import ray

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the commands tell of their work themselves
    settings: dict[str, Any] = {
        "log_to_driver": False,
        "runtime_env": {"env_vars": dict(environment)},
        "configure_logging": False,
    }
    try:
        if address:
            ray.init(address=address, **settings)
        else:
            machine = this_machine()
            ray.init(
                address="local", num_cpus=int(machine.cpus), num_gpus=int(machine.gpus), include_dashboard=dashboard,
                **settings,
            )  # fmt: skip
    except Exception as error:  # of many kinds, some without a class of their own
        raise UserError(
            f"Ray cannot be reached or started ({first_line(error)}): check --address, or leave it out"
        ) from None


def check_address(address: str) -> None:
    """UserError where nobody answers; Ray itself waits for minutes."""
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
                        "out to use this machine alone") from None  # fmt: skip
