"""The front of the service: HTTP in, jobs out. It opens nothing that a request names and decodes no image."""

import asyncio
import base64
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from infra.errors import UserError
from launch.serving.metrics import Metrics
from launch.serving.work import Answer, Job, Kind, header_of, refusal

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page.html")
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
MAX_STYLE = 2**31

Translate = Callable[[Job], Awaitable[Answer]]


@dataclass(frozen=True)
class Limits:
    """max_bytes: of a request's body. max_pixels: of an image. timeout_s: for a body to arrive, and then for its answer. queue:
    requests that are worked at or wait; more are turned away with 503."""

    max_bytes: int = 32_000_000
    max_pixels: int = 4_000_000
    timeout_s: float = 60.0
    queue: int = 128


class Front:
    """The application; it takes requests between `open` and `close`, and answers those that it took.

    about: what GET /about says. token: what requests must bear, if anything. local: the service listens for this machine
    alone, so a request that was sent to another name, or by a page of another site, is refused.
    """

    def __init__(self, limits: Limits, about: Mapping[str, object], *, token: str | None, local: bool) -> None:
        self.limits, self.about, self.token, self.local = limits, dict(about), token, local
        self.translate: Translate | None = None
        self.ready = False
        self.in_flight = 0
        self.metrics = Metrics(lambda: self.in_flight)
        self.page = PAGE.read_bytes()
        kinds: dict[str, Kind] = {"/translate": "translation"}
        if about.get("segmenter"):
            kinds["/flips"] = "flips"
        self.app = Starlette(
            routes=[
                Route("/", self._page), Route("/health", self._health), Route("/about", self._about),
                Route("/metrics", self._metrics),
                *(Route(path, self._taking(kind), methods=["POST"]) for path, kind in kinds.items()),
            ]
        )  # fmt: skip

    def open(self, translate: Translate) -> None:
        """translate: has a job done."""
        self.translate = translate

    def set_replicas(self, count: int) -> None:
        """Without any, requests are taken and wait, but the service does not say that it is ready."""
        self.metrics.replicas.set(count)
        self.ready = self.translate is not None and count > 0

    def close(self) -> None:
        self.translate, self.ready = None, False

    # ---- what is asked for ------------------------------------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        return Response(self.page, media_type="text/html; charset=utf-8", headers=page_headers(self.page))

    async def _health(self, request: Request) -> Response:
        return Response("ready\n" if self.ready else "not ready\n", 200 if self.ready else 503)

    async def _about(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse(self.about)

    async def _metrics(self, request: Request) -> Response:
        refused = self._refused(request)
        return refused or Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _taking(self, kind: Kind) -> Callable[[Request], Awaitable[Response]]:
        async def take(request: Request) -> Response:
            begin = time.perf_counter()
            answer = self._refused(request) or await self._answered(request, kind)
            self.metrics.answered(kind, answer.status_code, time.perf_counter() - begin)
            return answer

        return take

    # ---- how it is answered -----------------------------------------------------------------------------------------

    def _refused(self, request: Request) -> Response | None:
        """None for a request that may be answered."""
        if self.token is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
                return _sentence(401, "give the token: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        elif self.local:
            name = re.sub(r":\d+$", "", request.headers.get("host", ""))
            if name not in LOCAL_HOSTS or request.headers.get("sec-fetch-site") == "cross-site":
                return _sentence(403, f"this service is for its own machine: ask http://{LOCAL_HOSTS[1]}")
        return None

    async def _answered(self, request: Request, kind: Kind) -> Response:
        translate = self.translate
        if translate is None or self.in_flight >= self.limits.queue:
            why = "too many requests wait" if translate else "the service is not ready"
            return _sentence(503, f"{why}: ask again in a moment", {"Retry-After": "1"})
        self.in_flight += 1
        try:
            return _response(await self._done(request, kind, translate))
        except ClientDisconnect:
            return _sentence(400, "the client left")
        except TimeoutError:
            return _sentence(
                504, f"no translation within {self.limits.timeout_s:g} s: send a smaller image, or ask again"
            )
        except Exception:
            log.exception("a request failed")
            return _sentence(
                500, "the service could not translate this, and its log says why: send another image, or ask later"
            )
        finally:
            self.in_flight -= 1

    async def _done(self, request: Request, kind: Kind, translate: Translate) -> Answer:
        file = await self._body(request)
        if isinstance(file, Answer):
            return file
        try:
            style = _style(request.query_params.get("style", "0"))
            header_of(file, self.limits.max_pixels).close()
        except UserError as error:
            return refusal(error)
        answer = await asyncio.wait_for(translate(Job(kind, file, style)), self.limits.timeout_s)
        if answer.batch:
            self.metrics.translated(answer.batch)
        return answer

    async def _body(self, request: Request) -> bytes | Answer:
        """The body, of which no more is read than is taken; or why it is not."""
        limit = self.limits.max_bytes
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            return refusal(UserError("say how long the body is: Content-Length"), 411)
        if int(length) > limit:
            return refusal(UserError(f"a body of {length} bytes is larger than the {limit} that are taken here"), 413)
        parts = bytearray()
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                async for part in request.stream():
                    parts += part
        except TimeoutError:
            return refusal(UserError(f"the body did not arrive within {self.limits.timeout_s:g} s"), 408)
        return bytes(parts)


def _style(text: str) -> int:
    if not (re.fullmatch("[0-9]{1,10}", text) and int(text) < MAX_STYLE):
        raise UserError(f"style={text[:11]} is no whole number from 0 to {MAX_STYLE - 1}: give one")
    return int(text)


def _response(answer: Answer) -> Response:
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", **answer.headers}
    if answer.status in (408, 411, 413):  # part of the body may still be on its way
        headers["Connection"] = "close"
    return Response(answer.body, answer.status, headers, media_type=answer.media_type)


def _sentence(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    """The body was not read, so the connection is of no further use."""
    return Response(f"{text}\n", status, {"Connection": "close", **(headers or {})}, media_type="text/plain")


def page_headers(page: bytes) -> dict[str, str]:
    """By which a browser runs the page's own script and style, shows images that it made itself, and asks nobody else."""

    def hashes(tag: bytes) -> str:
        found = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in found)

    policy = (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
