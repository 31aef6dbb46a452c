"""What is refused before anything is started, and how replicas share what there is."""

import argparse
import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from infra.errors import UserError
from launch.serve import parser, service_of, token_in
from launch.serving.server import Service, is_loopback, listening, placed, serve


def given(*arguments: str) -> argparse.Namespace:
    return parser().parse_args(["runs/x", *arguments])


def test_options_make_a_service(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    args = given("--port", "0", "--host", "::1", "--token-file", str(token), "--max-mb", "1.5", "--max-mp", "0.25")
    service = service_of(args)
    assert (service.host, service.port, service.token) == ("::1", 0, "0123456789abcdef")
    assert (service.limits.max_bytes, service.limits.max_pixels) == (1_500_000, 250_000)
    assert service_of(given()) == Service()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--port", "70000"), "--port 70000 is no port"),
        (("--batch", "0"), "--batch 0 is impossible: give a number above 0"),
        (("--max-mp", "nan"), "--max-mp nan is impossible"),
        (("--timeout", "inf"), "--timeout inf is impossible"),
        (("--gpus", "-1"), "--gpus -1.0 is impossible: give 0 or more"),
    ],
)
def test_impossible_numbers_are_named(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        service_of(given(*arguments))


def test_a_token_is_a_secret(tmp_path: Path) -> None:
    file = tmp_path / "token"
    for text in ("", "short", "two words of it", "höchstgeheim"):
        file.write_text(text)
        with pytest.raises(UserError, match="holds no token: write 8 characters or more"):
            token_in(file)
    with pytest.raises(UserError, match="cannot be read"):
        token_in(tmp_path)


def test_addresses_that_others_can_ask_want_a_token() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("127.8.8.8") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("::") and not is_loopback("10.1.2.3")
    with pytest.raises(UserError, match="is no address of this machine"):
        is_loopback("no.such.name.invalid")
    nothing: Any = None
    with pytest.raises(UserError, match="--host 0.0.0.0 is open to other machines: give --token-file"):
        serve(Service(host="0.0.0.0"), nothing, {})


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=f"port {port} of 127.0.0.1 cannot be listened at .Address already in use.: give"
        ):
            listening("127.0.0.1", port)
    with pytest.raises(UserError, match="port 0 of 10.255.255.1 cannot be listened at"):
        listening("10.255.255.1", 0)


def test_answers_are_sent_at_once() -> None:
    """Whose second part would wait for the client's word otherwise, 40 ms."""

    async def of_a_connection() -> int:
        taken: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def take(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            its = writer.get_extra_info("socket")
            taken.set_result(its.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

        async with await asyncio.start_server(take, sock=listening("127.0.0.1", 0)) as server:
            _, client = await asyncio.open_connection(*server.sockets[0].getsockname())
            try:
                return await taken
            finally:
                client.close()

    assert asyncio.run(of_a_connection())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("there", "service", "expected"),
    [
        ({"CPU": 4.0}, Service(), (1, 4, 0)),
        ({"CPU": 4.0}, Service(replicas=2), (2, 2, 0)),
        ({"CPU": 8.0, "GPU": 2.0}, Service(), (2, 1, 1)),
        ({"CPU": 8.0, "GPU": 2.0}, Service(gpus=0.5), (4, 1, 0.5)),
        ({"CPU": 8.0, "GPU": 2.0}, Service(gpus=0), (1, 8, 0)),
        ({"CPU": 64.0}, Service(address="head:6379", replicas=3), (3, 1, 0)),
        ({"CPU": 4.0}, Service(gpus=1), "1 replicas with 1 GPUs each need more than the 0 that Ray has"),
        ({"CPU": 2.0}, Service(replicas=3), "3 replicas need as many CPUs, and Ray has 2"),
    ],
)  # fmt: skip
def test_replicas_share_what_there_is(
    there: dict[str, float], service: Service, expected: tuple[int, float, float] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: there)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            placed(service)
    else:
        found = placed(service)
        assert (found.replicas, found.cpus, found.gpus) == expected
