"""Load on `launch/serve.py` and on `mlflow models serve` with the same model, each a process of its own on this machine.

Each client sends the same PNG file again as soon as it has its answer; MLflow gets it in base64, and gives it so. The clients run
in this process, on the same cores as the servers.

Measurements, by their keys in the JSON, N being the number of clients:

rate/N, mlflow_rate/N      requests answered a second
p50/N, mlflow_p50/N        ms until half of the requests are answered
p99/N, mlflow_p99/N        ms until 99 of 100 are
faster/N                   rate / mlflow_rate
errors, mlflow_errors      requests without a translation, of all above
grown                      MiB that the service's processes hold more after the soak than after its first tenth
soak_errors                of the requests of the soak
kill_errors                of the requests in whose midst the replica was killed, which wait for the next one
kill_slowest               ms of the slowest of them
"""

import base64
import http.client
import io
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
from PIL import Image
from tqdm import tqdm

from infra.errors import UserError
from launch.benchmarks.measuring import Measurement, interleaved, ratios
from launch.runs.processes import bound
from pipelines.street_scenes import SOURCE_LAYOUT, render
from trainer.checkpoint import Checkpoint, find_checkpoint
from trainer.pyfunc import save_pyfunc_model
from trainer.translator import load_translator

HELP = "requests a second of launch/serve.py beside `mlflow models serve` with the same model; a soak; a killed replica"
STARTS_S = 180.0
REPOSITORY = Path(__file__).parents[2]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Load:
    """clients: how many at once, each for `requests` requests in all. soak: requests of the soak. size: (width, height)."""

    clients: Sequence[int] = (1, 8, 32)
    requests: int = 200
    soak: int = 2000
    size: tuple[int, int] = (256, 128)


@dataclass(frozen=True)
class Outcome:
    """seconds: of all. latencies: of each request, in s. errors: requests without a translation."""

    seconds: float
    latencies: Sequence[float]
    errors: int

    def ms(self, share: float) -> float:
        return 1000 * float(np.quantile(self.latencies, share))


@dataclass(frozen=True)
class Server:
    """process: its root. body: what is sent to `url`. good: whether an answer's body is a translation."""

    process: int
    url: str
    body: bytes
    kind: str
    good: Callable[[bytes], bool]


def run(model: Path, load: Load, repetitions: int) -> list[Measurement]:
    """model: a run or checkpoint."""
    if min(load.clients) < 1 or min(load.requests, load.soak) < 1:
        raise UserError("clients and requests are counts: give 1 or more")
    checkpoint = find_checkpoint(model)
    picture = scene(*load.size)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as servers:
        saved = Path(scratch) / "model"
        networks = [name for name, _ in load_translator(checkpoint).translation.named_children()]
        save_pyfunc_model(saved, Checkpoint(checkpoint).folder, networks, load_translator)
        ours = servers.enter_context(service(checkpoint, picture))
        theirs = servers.enter_context(mlflow_server(saved, picture))
        results = _side_by_side({"": ours, "mlflow_": theirs}, load, repetitions)
        return results + _soak(ours, load.soak) + _kill(ours, load)


def scene(width: int, height: int) -> bytes:
    """A street scene as a PNG file."""
    buffer = io.BytesIO()
    image, _ = render(0, 0, layout=SOURCE_LAYOUT, look="game", size=(width, height))
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


# ---- measures -------------------------------------------------------------------------------------------------------


def _side_by_side(servers: Mapping[str, Server], load: Load, repetitions: int) -> list[Measurement]:
    errors: dict[str, list[float]] = {prefix: [] for prefix in servers}

    def measure(prefix: str, server: Server, clients: int) -> dict[str, float]:
        outcome = asked(server, clients, load.requests)
        errors[prefix].append(outcome.errors)
        return {
            f"{prefix}rate/{clients}": len(outcome.latencies) / outcome.seconds,
            f"{prefix}p50/{clients}": outcome.ms(0.5), f"{prefix}p99/{clients}": outcome.ms(0.99),
        }  # fmt: skip

    for server in servers.values():
        asked(server, max(load.clients), max(load.clients))  # the first ones are slower
    measures = [
        lambda prefix=prefix, server=server, clients=clients: measure(prefix, server, clients)
        for clients in load.clients for prefix, server in servers.items()
    ]  # fmt: skip
    values = interleaved(measures, repetitions)
    results = [Measurement(name, "1/s" if "rate" in name else "ms", found) for name, found in values.items()]
    results += [
        Measurement(f"faster/{n}", "", ratios(values[f"rate/{n}"], values[f"mlflow_rate/{n}"])) for n in load.clients
    ]
    return results + [Measurement(f"{prefix}errors", "requests", [sum(found)]) for prefix, found in errors.items()]


def _soak(server: Server, requests: int) -> list[Measurement]:
    first = asked(server, 8, max(1, requests // 10))
    before = resident_mib(server.process)
    rest = asked(server, 8, requests - len(first.latencies))
    grown = resident_mib(server.process) - before
    return [Measurement("grown", "MiB", [grown]), Measurement("soak_errors", "requests", [first.errors + rest.errors])]


def _kill(server: Server, load: Load) -> list[Measurement]:
    (replica, *_) = replicas_of(server.process)
    timer = threading.Timer(0.2, lambda: os.kill(replica, signal.SIGKILL))
    timer.start()
    outcomes: list[Outcome] = []
    while timer.is_alive() or replica in replicas_of(server.process) or len(outcomes) < 2:
        outcomes.append(asked(server, 8, load.requests))
    slowest = max(max(outcome.latencies) for outcome in outcomes)
    errors = sum(outcome.errors for outcome in outcomes)
    return [Measurement("kill_errors", "requests", [errors]), Measurement("kill_slowest", "ms", [1000 * slowest])]


def replicas_of(process: int) -> list[int]:
    """The processes of the replicas of a service."""
    children = psutil.Process(process).children(recursive=True)
    return sorted(child.pid for child in children if "ServeReplica" in " ".join(child.cmdline()))


def resident_mib(process: int) -> float:
    """Of a process and all that it started; what they share counts for each."""
    root = psutil.Process(process)
    return sum(each.memory_info().rss for each in (root, *root.children(recursive=True))) / 2**20


def asked(server: Server, clients: int, requests: int) -> Outcome:
    """So many requests by so many clients, each with a connection of its own."""
    tickets, lock = itertools.count(), threading.Lock()
    latencies: list[float] = []
    errors = 0

    def client() -> None:
        nonlocal errors
        parts = urlsplit(server.url)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=120)
        while next(tickets) < requests:
            begin = time.perf_counter()
            try:
                connection.request("POST", parts.path, server.body, {"Content-Type": server.kind})
                answer = connection.getresponse()
                good = answer.status == 200 and server.good(answer.read())
            except (OSError, http.client.HTTPException):
                good = False
                connection.close()
            with lock:
                latencies.append(time.perf_counter() - begin)
                errors += not good
                bar.update()
        connection.close()

    begin = time.perf_counter()
    with (
        tqdm(total=requests, desc=f"{clients} clients", unit="request", disable=None, leave=False) as bar,
        ThreadPoolExecutor(clients) as pool,
    ):
        for each in [pool.submit(client) for _ in range(clients)]:
            each.result()
    return Outcome(time.perf_counter() - begin, latencies, errors)


# ---- servers --------------------------------------------------------------------------------------------------------


@contextmanager
def service(model: Path, picture: bytes, *options: str) -> Iterator[Server]:
    """launch/serve.py, until it is ready and to its end."""
    command = [REPOSITORY / "launch" / "serve.py", model, "--port", "0", "--timeout", "300", *options]
    with _started(command) as (process, log_file):
        address = _waited(process, log_file, lambda text: next(
            (line.removeprefix("ready: ") for line in text.splitlines() if line.startswith("ready: ")), None))  # fmt: skip
        yield Server(process.pid, f"{address}translate", picture, "image/png", lambda body: body[:4] == b"\x89PNG")


@contextmanager
def mlflow_server(model: Path, picture: bytes) -> Iterator[Server]:
    """`mlflow models serve`, as docs/training.md has it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local", "-p", port]
    body = json.dumps({"inputs": [base64.b64encode(picture).decode()]}).encode()

    def good(answer: bytes) -> bool:
        (text,) = json.loads(answer)["predictions"]
        return base64.b64decode(text)[:4] == b"\x89PNG"

    with _started(command) as (process, log_file):
        _waited(process, log_file, lambda _: _answers(port) or None)
        yield Server(process.pid, f"http://127.0.0.1:{port}/invocations", body, "application/json", good)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ping")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@contextmanager
def _started(command: Sequence[object]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A Python process with a file of its output; it gets SIGTERM at the end."""
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder) / "log"
        with log_file.open("wb") as output:
            process = subprocess.Popen(
                bound(command), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True, env=os.environ | {"PATH": _path(), "MLFLOW_DISABLE_TELEMETRY": "true"},
            )  # fmt: skip
        try:
            yield process, log_file
        finally:
            process.terminate()
            process.wait()


def _path() -> str:
    """MLflow starts uvicorn by its name."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _waited(process: subprocess.Popen[bytes], log_file: Path, found: Callable[[str], object]) -> str:
    end = time.monotonic() + STARTS_S
    while process.poll() is None and time.monotonic() < end:
        if (result := found(log_file.read_text(errors="replace"))) is not None:
            return str(result)
        time.sleep(0.2)
    last = "".join(log_file.read_text(errors="replace").strip().splitlines()[-1:])
    raise UserError(f"a server did not start ({last}): correct that first")
