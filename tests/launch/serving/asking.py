"""A front on a port, and requests to it."""

import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from typing import NamedTuple

import uvicorn

from launch.serving.front import Front


class Reply(NamedTuple):
    status: int
    body: bytes
    headers: Message  # whatever the case of their names

    @property
    def text(self) -> str:
        return self.body.decode()


def ask(url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, timeout: float = 60) -> Reply:
    """GET, or POST of a body."""
    request = urllib.request.Request(url, body, dict(headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return Reply(answer.status, answer.read(), answer.headers)
    except urllib.error.HTTPError as error:
        return Reply(error.code, error.read(), error.headers)


def raw(port: int, text: bytes, wait: float = 30) -> bytes:
    """What comes back for these bytes until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(text)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


@contextmanager
def listening(front: Front) -> Iterator[str]:
    """Its address, while it is served in a thread."""
    server = uvicorn.Server(uvicorn.Config(front.app, port=0, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
