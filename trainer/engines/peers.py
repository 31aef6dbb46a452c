"""The ranks of a run watch each other: when one dies, stops, hangs or raises, the others end too, and say why once."""

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from infra.errors import FAULT, OUTAGE, Stopped, UserError, exit_code_of, first_line
from infra.signals import LAST_WORDS_S, StopRequest, ToldToStop, end_process, is_orphan

BEAT_S = 1.0
HEARD_S = 5.0  # until a rank that raises has been heard by the others
LEAVE_S = 10.0  # for a rank to come to an end by itself once it has heard
SLOW = 10  # times as long as the slowest step so far is too long

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """Why all ranks end. rank: whose error it is, or who noticed. speaker: the rank that says it on the screen: 0, unless that
    is the one that is lost."""

    rank: int
    sentence: str
    exit_code: int
    speaker: int = 0


@dataclass
class _Seen:
    """The last sign of life of a rank, and when it came."""

    beat: str = ""
    at: float = 0.0
    facts: dict[str, Any] | None = None


class Peers:
    """A thread tells the others once a second that this process runs, and how its step goes; rank 0 watches all, all watch
    rank 0. What goes wrong is written into the store, first come first served, where every rank finds it within seconds.
    Another thread sees whether the store answers, which the first one may wait for without end.

    silence: seconds without a sign of life after which a rank counts as lost. longest: seconds that a step may take, if the
    slowest before it did not take a tenth of that. fault: why this run ends, once it is known. at_end: called before the
    process is ended by force, with the exit code.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, stop: StopRequest, *, silence: float, longest: float
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.silence, self.longest = silence, longest
        self.fault: Fault | None = None
        self.at_end: list[Callable[[int], object]] = []
        self._store, self._stop = store, stop
        self._place = f"{socket.gethostname()}{_namespace()}"
        self._step: tuple[int, float] | None = None  # in which this process is, and since when
        self._slowest = 0.0
        self._steps = 0
        self._late = 0  # beats since a step was seen to take too long
        self._seen = {other: _Seen() for other in range(world_size) if other != rank}
        self._answered = 0.0  # when the store last did
        self._learning = threading.Lock()
        self._left = threading.Event()
        self._main = threading.get_ident()
        self._threads = [
            threading.Thread(target=work, name="peers", daemon=True) for work in (self._work, self._keep_time)
        ]

    def begin(self) -> None:
        self._store.set_timeout(timedelta(seconds=self.silence / 2))
        self._answered = time.monotonic()
        for thread in self._threads:
            thread.start()
        self._stop.at_end.append(lambda code: self.leave())

    def leave(self) -> None:
        """Tell the others that this rank ends as it should, and stop watching them."""
        if not self._left.is_set():
            self._left.set()
            telling = threading.Thread(target=self._say_goodbye, daemon=True)
            telling.start()
            telling.join(HEARD_S)

    def _say_goodbye(self) -> None:
        with suppress(Exception):
            self._tell()
            self._store.set(f"left/{self.rank}", "")

    def _tell(self) -> None:
        """If this rank is to stop, so are all."""
        if self._stop.number is not None:
            self._store.set("told", str(self._stop.number))
            self._store.set(f"stops/{self.rank}", "")

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The training step of that number is under way; one that hangs is noticed. Of the first two nothing is known, and
        they may have to compile, so they get ten times as long; how long steps take is seen from the second on."""
        self._step = number, time.monotonic()
        try:
            yield
        finally:
            since, self._step = self._step[1], None
            self._steps += 1
            if self._steps > 1:
                self._slowest = max(self._slowest, time.monotonic() - since)

    @property
    def _limit(self) -> float:
        return max(self.longest if self._steps >= 2 else SLOW * self.longest, SLOW * self._slowest)

    # ---- what goes wrong in this process ------------------------------------------------------------------------------

    def judge(self, error: BaseException) -> BaseException:
        """What to raise in the place of what this rank's main thread raised: if it is another rank's fault, a Stopped that
        says so; else the error itself, of which the others have been told."""
        begun = time.monotonic()
        if _is_lost_connection(error):
            # Whose end it was shows within the time that a rank may be silent.
            while self.fault is None and time.monotonic() - begun < (
                HEARD_S if self._stop.told else self.silence + 2 * HEARD_S
            ):
                time.sleep(0.1)
            if self.fault is None and self._stop.told:
                error = ToldToStop()
        if self.fault is None and self._stop.told and isinstance(error, ToldToStop | Stopped):
            if isinstance(
                error, ToldToStop
            ):  # the others may not have heard, and would take this one's end for a fault
                with suppress(Exception):
                    self._tell()
                    self._is_on_all("stops")
            return error  # all do so
        log.debug("%s", "".join(traceback.format_exception(error)))
        if self.rank > 0:  # what all ranks raise is for rank 0 to say
            while self.fault is None and time.monotonic() - begun < 2 * BEAT_S:
                time.sleep(0.1)
        if self.fault is None:
            ours = isinstance(error, UserError | Stopped)
            words = str(error) if ours else f"{type(error).__name__}: {first_line(error)}"
            words = words if self.rank == 0 else f"[rank {self.rank}] {words}"
            self._accuse(Fault(self.rank, words, exit_code_of(error)))
        fault = self.fault
        assert fault is not None
        said = self._is_said(fault)
        if fault.rank == self.rank and fault.exit_code == FAULT and not isinstance(error, Stopped):
            return error  # its traceback tells more
        return Stopped(fault.sentence, fault.exit_code, said=said)

    def _accuse(self, fault: Fault) -> None:
        """Tell all ranks, unless another one was first."""
        mine = json.dumps(asdict(fault))
        try:
            self._learn(self._store.compare_set("fault", "", mine).decode())
        except Exception:  # the store is away
            self._learn(mine)
        self._confirm()

    def _learn(self, text: str) -> None:
        with self._learning:
            if self.fault is not None:
                return
            fault = Fault(**json.loads(text))
            limit = threading.Timer(LEAVE_S + LAST_WORDS_S, os._exit, (fault.exit_code,))
            limit.daemon = True
            limit.start()  # in case that a disk or the screen does not take what is said now
            log.debug("the main thread is here:\n%s", self._stack())
            with suppress(OSError):  # a screen that is gone
                log.log(logging.ERROR if self.rank == fault.speaker else logging.INFO, "%s", fault.sentence)
            self.fault = fault

    def _confirm(self) -> None:
        with suppress(Exception):
            self._store.set(f"heard/{self.rank}", "")

    def _is_said(self, fault: Fault) -> bool:
        """Whether it is on the screen. Waits until all have heard of it, for a while: a rank that ends takes others with it, and
        perhaps the store."""
        with suppress(Exception):
            if not self._is_on_all("heard"):
                return self.rank == fault.speaker or self._store.check([f"heard/{fault.speaker}"])
        return True

    def _is_on_all(self, what: str) -> bool:
        """Whether all ranks have a key of this name, if need be after a while."""
        deadline = time.monotonic() + HEARD_S
        while not self._store.check([f"{what}/{rank}" for rank in range(self.world_size)]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._main)
        return "".join(traceback.format_stack(frame)) if frame else ""

    # ---- the threads ----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        beats = 0
        while not self._left.wait(BEAT_S) and self.fault is None:
            beats += 1
            try:
                self._exchange(beats)
                self._answered = time.monotonic()
            except dist.DistNetworkError as error:
                # With its launcher the store may go as well: this rank is told to stop then, and has its grace period.
                if self._left.is_set() or self._stop.told or is_orphan():
                    return
                self._miss_store(f"is gone: rank 0 has ended, or its machine is away ({first_line(error)})")
            except Exception:  # it may answer yet
                log.debug("the store does not answer", exc_info=True)

    def _keep_time(self) -> None:
        before = time.monotonic()
        while not self._left.wait(BEAT_S) and self.fault is None:
            now = time.monotonic()
            if now - before > BEAT_S + HEARD_S:  # this process was stopped itself, and cannot say so of others
                self._answered = now
                for seen in self._seen.values():
                    seen.at = now
            elif now - self._answered > self.silence:
                self._miss_store(
                    f"has not answered for {self.silence:g} s: rank 0, or the launcher, is stopped or its machine away"
                )
            before = time.monotonic()
        if self.fault is not None:
            time.sleep(LEAVE_S)
            end_process(self.fault.exit_code, self.at_end)  # whatever the main thread does

    def _miss_store(self, what: str) -> None:
        words = f"the store of the ranks {what}; the same command goes on from the last checkpoint"
        # Of all that notice at once one speaks.
        self._learn(json.dumps(asdict(Fault(self.rank, words, OUTAGE, speaker=min(self.rank, 1)))))

    def _exchange(self, beats: int) -> None:
        facts = {"place": self._place, "pid": os.getpid(), "beat": beats, "overdue": self._overdue()}
        self._store.set(f"beat/{self.rank}", json.dumps(facts))
        if self._stop.told:
            self._tell()
        elif self._store.check(["told"]):
            self._stop.note(int(self._store.get("told")))
            self._tell()
            os.kill(os.getpid(), signal.SIGTERM)  # which interrupts what may be
        if self._store.check(["fault"]):
            self._learn(self._store.get("fault").decode())
            self._confirm()
            return
        for other in self._seen if self.rank == 0 else (0,):
            self._look_at(other)
        if self.rank == 0:
            self._find_stuck()

    def _look_at(self, other: int) -> None:
        seen, now = self._seen[other], time.monotonic()
        beat = self._store.get(f"beat/{other}").decode() if self._store.check([f"beat/{other}"]) else ""
        if not seen.at or beat != seen.beat:
            seen.beat, seen.at, seen.facts = beat, now, json.loads(beat) if beat else None
        facts = seen.facts or {}
        dead = facts.get("place") == self._place and not _is_alive(int(facts["pid"]))
        if (dead or now - seen.at > self.silence) and not self._store.check([f"left/{other}"]):
            if self._store.check(["fault"]):
                return  # which it has told before it died
            who = f"rank {other} (process {facts['pid']} on {facts['place'].split()[0]})" if facts else f"rank {other}"
            what = (
                "has died"
                if dead
                else f"gave no sign of life for {self.silence:g} s: it is stopped, or its machine is away"
            )
            words = f"{who} {what}; the same command goes on from the last checkpoint"
            self._accuse(Fault(self.rank, words, OUTAGE, speaker=self.rank))

    def _overdue(self) -> str:
        """Words on a step that takes too long; "" while it does not."""
        step = self._step
        if step is None or time.monotonic() - step[1] < self._limit:
            return ""
        return f"step {step[0]} has not ended in {self._limit:.0f} s"

    def _find_stuck(self) -> None:
        late = {
            other: seen.facts["overdue"] for other, seen in self._seen.items() if seen.facts and seen.facts["overdue"]
        }
        if own := self._overdue():
            late[0] = own
        self._late = self._late + 1 if late else 0
        if self._late > 2:  # those that began a moment later have said so, too
            ranks = ", ".join(map(str, sorted(late)))
            words = (
                f"{late[min(late)]} on rank {ranks} (--engine.longest-step): the logs of the ranks say where each is"
            )
            self._accuse(Fault(0, f"{words}; the same command goes on from the last checkpoint", FAULT))


def _namespace() -> str:
    """Of process ids: two containers with one host name may have their own."""
    with suppress(OSError):
        return f" {os.readlink('/proc/self/ns/pid')}"
    return ""


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _is_lost_connection(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
