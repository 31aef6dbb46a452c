"""One service from start to end: a port, Ray, replicas, the front, and what happens on SIGTERM."""

import asyncio
import ipaddress
import logging
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from infra import ray_cluster
from infra.errors import Stopped, UserError, first_line
from launch.serving.front import Front, Limits
from launch.serving.placement import Placement
from trainer.translator import Translator

log = logging.getLogger(__name__)

POLL_S = 1.0
RAY_ANSWERS_S = 60.0
NOT_STARTED = 1  # exit code
ENVIRONMENT = {**ray_cluster.ENVIRONMENT, "RAY_SERVE_ENABLE_TELEMETRY": "0"}


@dataclass(frozen=True)
class Service:
    """host, port: where it listens; port 0: a free one. token: what requests must bear; needed where others can ask.
    address: of a Ray cluster; None: Ray is started here. segmenter: the path of one, for flips. gpus: of each replica; None:
    one where there are any."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    address: str | None = None
    segmenter: str | None = None
    replicas: int | None = None
    gpus: float | None = None
    batch: int = 8
    wait_ms: float = 5.0
    limits: Limits = field(default_factory=Limits)


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can ask at this address. UserError for a name that is none."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise UserError(f"--host {host} is no address of this machine ({error.strerror}): give one") from None
    return all(ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in found)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. UserError where that cannot be."""
    family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    # asyncio sends the parts of an answer at once on sockets that say TCP; else the second waits 40 ms for the client's word.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(where)
        found.listen(512)
    except OSError as error:
        found.close()
        raise UserError(
            f"port {port} of {host} cannot be listened at ({error.strerror}): give another --port"
        ) from None
    return found


def serve(service: Service, translator: Translator, about: dict[str, object]) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what was accepted and return. about: see `Front`.

    UserError, before anything is started, for a port in use and for an address that others can ask without a token.
    """
    local = is_loopback(service.host)
    if not local and service.token is None:
        raise UserError(f"--host {service.host} is open to other machines: give --token-file with a secret in it, or leave "
                        "--host out to serve this machine alone")  # fmt: skip
    with (
        listening(service.host, service.port) as port,
        ray_cluster.connected(service.address, lost="start the service again", environment=ENVIRONMENT),
    ):
        asyncio.run(_serve(service, translator, about, port, local))


async def _serve(
    service: Service, translator: Translator, about: dict[str, object], port: socket.socket, local: bool
) -> None:
    from launch.serving.replica import Sender, deploy, withdraw

    name, placement = f"srunit-{uuid.uuid4().hex[:8]}", placed(service)
    front = Front(service.limits, about, token=service.token, local=local)
    server = _Server(
        uvicorn.Config(
            front.app, lifespan="off", log_level="warning", access_log=False, server_header=False, proxy_headers=False,
            limit_concurrency=4 * service.limits.queue, timeout_graceful_shutdown=int(service.limits.timeout_s) + 1,
        )
    )  # fmt: skip
    end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end.set)
    ending, listener = asyncio.create_task(end.wait()), asyncio.create_task(server.serve([port]))
    try:
        log.info("starting %d replica%s", placement.replicas, "" if placement.replicas == 1 else "s")
        pixels = service.limits.max_pixels
        starting = _aside(lambda: deploy(name, placement, translator, service.segmenter, pixels, service.limits.queue))
        await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not end.is_set():
            if error := starting.exception():
                raise Stopped(
                    f"the replicas did not start ({first_line(error)}): see Ray's logs", NOT_STARTED
                ) from error
            front.open(Sender(starting.result(), front.metrics.retries.inc))
            await _watch(front, name, ending, lambda: _tell(service.host, port))
        log.info("ending, once the %d requests that were taken are answered", front.in_flight)
    finally:
        front.close()
        server.should_exit = True
        await listener
        if service.address:
            await asyncio.to_thread(withdraw, name)


def _aside(work: Callable[[], Any]) -> "asyncio.Future[Any]":
    """What a thread makes for which nobody waits at the end, since a start that was given up may last."""
    made: Future[Any] = Future()

    def run() -> None:
        try:
            made.set_result(work())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return asyncio.wrap_future(made)


async def _watch(front: Front, name: str, ending: "asyncio.Task[bool]", tell: Callable[[], None]) -> None:
    """Keep the front's number of replicas up to date until the end; `tell` when there is one first."""
    from launch.serving.replica import ready_replicas

    told = False
    while not ending.done():
        try:
            front.set_replicas(await asyncio.wait_for(asyncio.to_thread(ready_replicas, name), RAY_ANSWERS_S))
        except Exception as error:  # of many kinds
            raise Stopped(
                f"Ray has died under the service ({first_line(error)}): start it again", ray_cluster.RAY_DIED
            ) from error
        if front.ready and not told:
            tell()
            told = True
        await asyncio.wait({ending}, timeout=POLL_S)


def _tell(host: str, port: socket.socket) -> None:
    print(f"ready: http://{f'[{host}]' if ':' in host else host}:{port.getsockname()[1]}/", flush=True)


def placed(service: Service) -> Placement:
    """How the replicas share what Ray has. UserError where it has too little."""
    import ray

    there = ray.cluster_resources()
    cpus, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
    each = service.gpus if service.gpus is not None else min(1.0, gpus)
    replicas = service.replicas or (max(1, int(gpus / each)) if each else 1)
    if each * replicas > gpus:
        raise UserError(f"{replicas} replicas with {each:g} GPUs each need more than the {gpus:g} that Ray has: "
                        "give fewer --replicas, or --gpus 0 for the CPU")  # fmt: skip
    if replicas > cpus:
        raise UserError(f"{replicas} replicas need as many CPUs, and Ray has {cpus:g}: give fewer --replicas")
    # Replicas of a cluster lie on machines of any size.
    share = 1 if each or service.address else int(cpus // replicas)
    return Placement(replicas, max(1, share), each, service.batch, service.wait_ms / 1000)


class _Server(uvicorn.Server):
    """Whose signals are `_serve`'s."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
