"""HTTP in, jobs out: what is taken, what is refused, and how."""

import asyncio
import io
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from launch.serving.front import Front, Limits
from launch.serving.work import Answer, Job
from tests.launch.serving.asking import ask, listening, raw

LIMITS = Limits(max_bytes=4096, max_pixels=32 * 32, timeout_s=0.5, queue=2)


def png(height: int = 8, width: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


async def echo(job: Job) -> Answer:
    return Answer(200, job.file, "image/png", {"X-Job": f"{job.kind} {job.style}"}, batch=1)


def front(
    *,
    limits: Limits = LIMITS,
    token: str | None = None,
    local: bool = True,
    segmenter: bool = False,
    opened: bool = True,
) -> Front:
    result = Front(limits, {"model": "m", "segmenter": segmenter}, token=token, local=local)
    if opened:
        result.open(echo)
        result.set_replicas(1)
    return result


def test_a_file_goes_in_and_comes_out() -> None:
    with listening(front()) as url:
        reply = ask(f"{url}/translate?style=7", png())
        assert (reply.status, reply.body, reply.headers["X-Job"]) == (200, png(), "translation 7")
        assert reply.headers["Content-Type"] == "image/png" and reply.headers["X-Content-Type-Options"] == "nosniff"
        assert ask(f"{url}/flips", png()).status == 404
        assert ask(f"{url}/translate").status == 405
    with listening(front(segmenter=True)) as url:
        assert ask(f"{url}/flips", png()).headers["X-Job"] == "flips 0"


def test_health_says_when_it_is_ready() -> None:
    service = front(opened=False)
    with listening(service) as url:
        assert ask(f"{url}/health").status == 503
        reply = ask(f"{url}/translate", png())
        assert reply.status == 503 and reply.headers["Retry-After"] == "1"
        service.open(echo)
        assert ask(f"{url}/health").status == 503
        service.set_replicas(1)
        assert ask(f"{url}/health").status == 200
        service.set_replicas(0)  # requests wait for the next replica
        assert ask(f"{url}/health").status == 503 and ask(f"{url}/translate", png()).status == 200
        service.close()
        assert ask(f"{url}/translate", png()).status == 503


@pytest.mark.parametrize(
    ("body", "query", "status", "words"),
    [
        (b"no image", "", 422, "this is no PNG or JPEG file"),
        (png(33, 32), "", 422, "an image of 32x33 has more than the 1024 pixels that are taken here"),
        (png(), "?style=-1", 422, "style=-1 is no whole number"),
        (png(), "?style=99999999999999", 422, "style=99999999999 is no whole number"),
        (png(), f"?style={'0' * 5000}", 422, "style=00000000000 is no whole number"),
        (png(), f"?style={2**31}", 422, "is no whole number from 0 to 2147483647"),
        (b"x" * 4097, "", 413, "a body of 4097 bytes is larger than the 4096"),
    ],
)
def test_what_cannot_be_taken_is_said_in_a_sentence(body: bytes, query: str, status: int, words: str) -> None:
    with listening(front()) as url:
        reply = ask(f"{url}/translate{query}", body)
        assert reply.status == status and words in reply.text and reply.text.count("\n") == 1


def test_nothing_that_a_request_names_is_opened() -> None:
    with listening(front()) as url:
        for path in (
            "/translate?url=http://127.0.0.1:1/x.png",
            "/translate?path=/etc/hostname",
            "/translate?file=page.html",
        ):
            assert ask(url + path, b"/etc/hostname").status == 422
        for path in ("/page.html", "/../../README.md", "/etc/hostname", "/static/x", "//etc/hostname"):
            assert ask(url + path).status == 404


def test_a_body_without_a_length_is_not_read() -> None:
    with listening(front()) as url:
        port = int(url.rpartition(":")[2])
        head = b"POST /translate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert raw(port, head + b"5\r\nhello\r\n0\r\n\r\n").startswith(b"HTTP/1.1 411")


def test_a_body_that_does_not_arrive_is_waited_for_only_so_long() -> None:
    with listening(front()) as url:
        port = int(url.rpartition(":")[2])
        begin = time.monotonic()
        answer = raw(port, b"POST /translate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nonly this")
        assert answer.startswith(b"HTTP/1.1 408") and time.monotonic() - begin < 10


def test_a_translation_that_takes_too_long_is_given_up() -> None:
    async def slow(job: Job) -> Answer:
        await asyncio.sleep(30)
        return await echo(job)

    service = front()
    service.open(slow)
    with listening(service) as url:
        reply = ask(f"{url}/translate", png())
        assert reply.status == 504 and "no translation within 0.5 s" in reply.text
        assert service.in_flight == 0


def test_a_translation_that_fails_is_said_to_and_counted() -> None:
    async def fail(job: Job) -> Answer:
        raise RuntimeError("CUDA out of memory")

    service = front()
    service.open(fail)
    with listening(service) as url:
        reply = ask(f"{url}/translate", png())
        assert reply.status == 500 and "could not translate this" in reply.text and "CUDA" not in reply.text
        assert 'status="500"' in ask(f"{url}/metrics").text


def test_more_requests_than_the_queue_holds_are_turned_away() -> None:
    gate = threading.Event()

    async def waiting(job: Job) -> Answer:
        while not gate.is_set():
            await asyncio.sleep(0.01)
        return await echo(job)

    service = front(limits=Limits(queue=2))
    service.open(waiting)
    with listening(service) as url, ThreadPoolExecutor(2) as pool:
        first = [pool.submit(ask, f"{url}/translate", png()) for _ in range(2)]
        while service.in_flight < 2:
            time.sleep(0.01)
        assert ask(f"{url}/translate", png()).status == 503
        assert ask(f"{url}/health").status == 200
        gate.set()
        assert [each.result().status for each in first] == [200, 200]


def test_a_token_is_asked_for_where_others_can_ask() -> None:
    with listening(front(token="correct horse", local=False)) as url:
        for given in (None, "correct horses", "", "Bearer"):
            headers = {} if given is None else {"Authorization": f"Bearer {given}"}
            for path, body in (("/translate", png()), ("/about", None), ("/metrics", None)):
                reply = ask(url + path, body, headers)
                assert reply.status == 401 and reply.headers["WWW-Authenticate"] == "Bearer"
        assert ask(f"{url}/translate", png(), {"Authorization": "Bearer correct horse"}).status == 200
        assert ask(f"{url}/health").status == ask(f"{url}/").status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200), ({"Host": "[::1]"}, 200), ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403), ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)  # fmt: skip
def test_another_sites_page_cannot_ask_this_machine(headers: dict[str, str], status: int) -> None:
    with listening(front()) as url:
        assert ask(f"{url}/translate", png(), headers).status == status


def test_prometheus_reads_what_was_counted() -> None:
    service = front()
    with listening(service) as url:
        for body in (png(), png(), b"no image"):
            ask(f"{url}/translate", body)
        text = ask(f"{url}/metrics").text
    assert 'srunit_requests_total{kind="translation",status="200"} 2.0' in text
    assert 'srunit_requests_total{kind="translation",status="422"} 1.0' in text
    assert 'srunit_request_seconds_count{kind="translation"} 3.0' in text
    assert "srunit_batch_images_count 2.0" in text and "srunit_replicas 1.0" in text and "srunit_in_flight 0.0" in text


def test_the_page_asks_nobody_else() -> None:
    with listening(front()) as url:
        reply = ask(f"{url}/")
    assert reply.headers["Content-Type"].startswith("text/html")
    policy = reply.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert not re.search(r"(?:src|href)=[\"'](?!data:)[^\"']", reply.text) and "http" not in reply.text
