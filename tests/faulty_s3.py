"""A proxy in front of a real S3 server that makes chosen requests go wrong."""

import http.client
import random
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

Fault = Literal["busy", "throttled", "denied", "missing", "changed", "cut", "empty", "hang", "stall", "reset", "flip"]
"""busy: 503 SlowDown. throttled: 429 TooManyRequests. denied: 403 AccessDenied. missing: 404 NoSuchKey. changed: 412
PreconditionFailed (these with an XML body). cut: half of the body, then the end. empty: the headers, then the end. hang:
no answer, ever. stall: half of the body, then silence. reset: the connection is reset. flip: the lowest bit of one byte
of the body is inverted, of what is sent in a PUT, else of what is answered; the tars of `shardmaker` stay whole tars."""

_REFUSALS = {
    "busy": (503, "SlowDown"),
    "throttled": (429, "TooManyRequests"),
    "denied": (403, "AccessDenied"),
    "missing": (404, "NoSuchKey"),
    "changed": (412, "PreconditionFailed"),
}


@dataclass(frozen=True)
class Request:
    """One request that came in. path: "/bucket/key?query". range: of bytes, as in the header; "" if whole."""

    method: str
    path: str
    range: str


class FaultyS3:
    """A running proxy.

    faults: what befalls the requests to come, one each (None: nothing), after which all goes well; or a function of the
    request. May be set at any time. requests: those that came in so far.
    """

    def __init__(self, upstream: str) -> None:
        self.faults: list[Fault | None] | Callable[[Request], Fault | None] = []
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._upstream = urlsplit(upstream).netloc
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # keeps connections open, and answers "Expect: 100-continue"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                proxy.answer(self)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        request = Request(handler.command, handler.path, handler.headers.get("Range", ""))
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        self.requests.append(request)
        fault = self._next_fault(request)
        if fault == "hang":
            self._fall_silent(handler)
        elif fault == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
            handler.close_connection = True
        elif fault in _REFUSALS:
            status, code = _REFUSALS[fault]
            error = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
            self._reply(handler, status, {"Content-Type": "application/xml"}, error.encode(), None)
        else:
            if fault == "flip" and request.method == "PUT":
                body, fault = _flipped(body), None
            self._reply(handler, *self._forward(handler, body), fault)

    def _next_fault(self, request: Request) -> Fault | None:
        if callable(self.faults):
            return self.faults(request)
        return self.faults.pop(0) if self.faults else None

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of the real server. The Host header stays as it was signed."""
        headers = {name: value for name, value in handler.headers.items() if name not in ("Expect", "Connection")}
        connection = http.client.HTTPConnection(self._upstream, timeout=30)
        try:
            connection.request(handler.command, handler.path, body, headers)
            response = connection.getresponse()
            kept = {name: value for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP}
            return response.status, kept, response.read()
        finally:
            connection.close()

    def _reply(
        self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes, fault: Fault | None
    ) -> None:
        if fault == "flip":
            body = _flipped(body)
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        if "Content-Length" not in headers:  # an answer to HEAD has that of the object
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        sent = {"cut": len(body) // 2, "stall": len(body) // 2, "empty": 0}.get(fault or "", len(body))
        handler.wfile.write(body[:sent])
        handler.close_connection = sent < len(body)
        if fault == "stall":
            self._fall_silent(handler)

    def _fall_silent(self, handler: BaseHTTPRequestHandler) -> None:
        self.closing.wait()
        handler.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that gave up is no news
            super().handle_error(request, client_address)


_HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "date", "server"}


def _flipped(body: bytes) -> bytes:
    place = len(body) * 5 // 8
    return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :] if body else body


def now_and_then(fault: Fault, share: float, seed: int = 0) -> Callable[[Request], Fault | None]:
    """Faults for `FaultyS3.faults`: that share of the requests, in a fixed random order of those that come in."""
    rng = random.Random(seed)
    return lambda _: fault if rng.random() < share else None


@contextmanager
def faulty_s3(upstream_endpoint: str) -> Iterator[FaultyS3]:
    """Run the proxy on a free port of 127.0.0.1; point AWS_ENDPOINT_URL at its `endpoint`."""
    proxy = FaultyS3(upstream_endpoint)
    threading.Thread(target=proxy.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.closing.set()
        proxy.server.shutdown()
        proxy.server.server_close()
