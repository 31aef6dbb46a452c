"""Ranks that watch each other, as threads of one process around a real store."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from infra.errors import Stopped, UserError
from infra.signals import StopRequest, ToldToStop
from trainer.engines import EngineConfig, ddp
from trainer.engines import peers as module
from trainer.engines.attempts import of_this_attempt
from trainer.engines.ddp import PATIENCE
from trainer.engines.peers import Fault, Peers

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes of ranks that are ended by force; all that takes seconds is faster."""
    codes: list[int] = []

    monkeypatch.setattr(module.os, "_exit", codes.append)
    monkeypatch.setattr(module.logging, "shutdown", lambda: None)
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    monkeypatch.setattr(module, "LEAVE_S", 0.3)
    return codes


@contextmanager
def two(silence: float = 60.0, longest: float = 60.0, begin: tuple[int, ...] = (0, 1)) -> Iterator[list[Peers]]:
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    ranks = []
    for rank in range(2):
        store = dist.PrefixStore("attempt", dist.TCPStore("127.0.0.1", server.port, None, False))
        ranks.append(Peers(store, rank, 2, StopRequest(30), silence=silence, longest=longest))
    for rank in begin:
        ranks[rank].begin()
    try:
        yield ranks
    finally:
        for each in ranks:
            each.leave()
        for number in begin:
            join(ranks[number])


def join(rank: Peers) -> None:
    for thread in rank._threads:
        thread.join(20)


def fault_of(rank: Peers) -> str:
    """Its sentence; "" while there is none."""
    return rank.fault.sentence if rank.fault else ""


def until(what: Callable[[], object], limit: float = 20.0) -> None:
    deadline = time.monotonic() + limit
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_what_a_rank_raises_is_said_by_rank_0_and_ends_both(caplog: pytest.LogCaptureFixture, ends: list[int]) -> None:
    with two() as (zero, one):
        raised = one.judge(UserError("rank 1 of this machine has no GPU: start fewer processes"))
        assert isinstance(raised, Stopped) and (raised.exit_code, raised.said) == (2, True)
        until(lambda: ends)
        errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert errors == ["[rank 1] rank 1 of this machine has no GPU: start fewer processes"]
        assert zero.fault and zero.fault.exit_code == 2 and set(ends) == {2}


def test_what_both_raise_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with two() as (zero, one):
        first = zero.judge(UserError("no prepared data at nowhere"))
        second = one.judge(UserError("no prepared data at nowhere"))
        assert [str(error) for error in (first, second)] == ["no prepared data at nowhere"] * 2
        assert [getattr(error, "said", None) for error in (first, second)] == [True, True]
        assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with two() as (zero, one):
        error = KeyError("generator")
        assert one.judge(error) is error
        until(lambda: zero.fault)
        assert zero.fault == Fault(1, "[rank 1] KeyError: 'generator'", 1)


def test_a_rank_without_a_sign_of_life_counts_as_lost(ends: list[int]) -> None:
    with two(silence=1.0, begin=(0,)) as (zero, _):
        until(lambda: ends)
        assert zero.fault and "rank 1 gave no sign of life for 1 s: it is stopped, or its" in zero.fault.sentence
        assert ends == [75]


def test_a_dead_process_is_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with two() as (zero, one):
        own = os.getpid()
        monkeypatch.setattr(module.os, "getpid", lambda: dead.pid)  # as both say
        until(lambda: zero.fault, 5)
        assert zero.fault and f"(process {dead.pid} on " in zero.fault.sentence and "has died" in zero.fault.sentence
        assert own != dead.pid and one


def test_a_step_that_hangs_is_noticed_and_one_that_is_slow_as_before_is_not() -> None:
    with two(longest=0.3) as (zero, one):
        for number, seconds in ((1, 0.4), (2, 0.1), (3, 0.1)):  # the first is left out
            with one.step(number):
                time.sleep(seconds)
        with one.step(4):
            time.sleep(0.8)  # ten times the slowest before is 1 s
            assert not fault_of(zero)
            until(lambda: fault_of(zero))
        assert re.match(r"step 4 has not ended in \d+ s on rank 1 \(--engine.longest-step\)", fault_of(zero))


def test_a_lost_connection_is_the_fault_of_who_is_lost() -> None:
    with two(silence=1.0, begin=(0,)) as (zero, _):
        raised = zero.judge(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
        assert isinstance(raised, Stopped) and raised.exit_code == 75 and "rank 1 gave no sign of life" in str(raised)


def test_what_one_is_told_all_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    with two() as (zero, one):
        monkeypatch.setattr(module.os, "kill", lambda pid, number: heard.append(number))
        one._stop.note(signal.SIGINT)
        until(lambda: heard)
        assert (heard, zero._stop.exit_code) == ([signal.SIGTERM], 130)
        error = ToldToStop()
        assert zero.judge(error) is error and zero.fault is None


def test_who_is_told_while_it_is_set_up_waits_until_all_have_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end may take the store with it."""
    heard: list[int] = []
    with two() as (zero, one):
        monkeypatch.setattr(module.os, "kill", lambda pid, number: heard.append(number))
        zero._stop.note(signal.SIGTERM)
        zero.judge(ToldToStop())
        assert one._stop.told and heard == [signal.SIGTERM]


@pytest.mark.parametrize("why", ["told", "orphan", ""])
def test_a_store_that_goes_with_the_launcher_is_no_fault(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank is told to stop then, and has time to save."""
    monkeypatch.setattr(module, "is_orphan", lambda: why == "orphan")
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    store = dist.PrefixStore("attempt", dist.TCPStore("127.0.0.1", server.port, None, False))
    one = Peers(store, 1, 2, StopRequest(30), silence=60, longest=60)
    one.begin()
    until(lambda: store.check(["beat/1"]))
    if why == "told":
        one._stop.note(signal.SIGTERM)
    del server
    one._threads[0].join(20)
    assert not one._threads[0].is_alive()
    one.leave()
    join(one)
    assert fault_of(one).startswith("the store of the ranks is gone") == (not why)
    assert one.fault is None or one.fault.exit_code == 75


STORE = """
import time
import torch.distributed as dist
server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
print(server.port, flush=True)
time.sleep(600)
"""


def test_a_store_that_is_stopped_is_noticed(ends: list[int]) -> None:
    """As where rank 0, which keeps it under deepspeed, is stopped."""
    keeper = subprocess.Popen([sys.executable, "-c", STORE], stdout=subprocess.PIPE, text=True)
    try:
        assert keeper.stdout
        store = dist.PrefixStore("attempt", dist.TCPStore("127.0.0.1", int(keeper.stdout.readline()), None, False))
        one = Peers(store, 1, 2, StopRequest(30), silence=2, longest=60)
        one.begin()
        until(lambda: one._seen[0].at)
        keeper.send_signal(signal.SIGSTOP)
        until(lambda: one.fault and ends, 40)
        assert fault_of(one).startswith("the store of the ranks has not answered for 2 s: rank 0, or the launcher, is")
        assert set(ends) == {75}
    finally:
        keeper.kill()
        keeper.wait()


def test_a_rank_that_has_left_is_not_missed() -> None:
    with two(silence=0.5) as (zero, one):
        time.sleep(0.3)
        one.leave()
        time.sleep(1.5)
        assert zero.fault is None


def test_ranks_that_do_not_find_each_other_are_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(server, 1, 2)]))
    monkeypatch.setattr(ddp, "PATIENCE", timedelta(seconds=0.2))
    with pytest.raises(Stopped, match=r"the 2 processes cannot reach each other \(not all of 2 ranks") as stop:
        ddp.DdpEngine(EngineConfig(device="cpu"))
    assert stop.value.exit_code == 75


@pytest.mark.parametrize(("compiles", "longest"), [("false", 45), ("true", 450)])
def test_what_is_compiled_in_the_middle_of_a_run_may_take_its_time(compiles: str, longest: float) -> None:
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    engine = object.__new__(ddp.DdpEngine)
    engine.config, engine.rank, engine.world_size = EngineConfig(compile=compiles), 0, 2
    engine.device = torch.device("cpu")
    engine._store = dist.PrefixStore("attempt", dist.TCPStore("127.0.0.1", server.port, None, False))
    engine.watch(StopRequest(30))
    assert engine.peers and engine.peers.longest == longest
    engine.peers.leave()
    join(engine.peers)


def test_each_attempt_has_a_store_of_its_own_whatever_was_asked_before() -> None:
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    server.set("asks/1", "of a process that has ended")
    code = (
        "import sys, torch.distributed as dist; from trainer.engines.attempts import of_this_attempt; "
        "from trainer.engines.ddp import PATIENCE; store = dist.TCPStore('127.0.0.1', int(sys.argv[1]), None, False); "
        "of_this_attempt(store, 1, 2, PATIENCE).set('address', 'new')"
    )
    names: list[dist.PrefixStore] = []
    for _ in range(2):
        other = subprocess.Popen([sys.executable, "-c", code, str(server.port)])
        mine = of_this_attempt(server, 0, 2, PATIENCE)
        assert not names or not mine.check(["of the first"])
        names.append(mine)
        mine.set("of the first", "")
        assert other.wait(60) == 0 and mine.get("address") == b"new"
