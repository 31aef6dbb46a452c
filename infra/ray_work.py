"""Work that is dealt to the machines of a Ray cluster, and done again where a worker is lost."""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from infra.errors import FAULT, OUTAGE, Stopped, UserError, first_line
from infra.ray_cluster import Machine

Job = TypeVar("Job")
Result = TypeVar("Result")

ATTEMPTS = 3  # a job that ends every worker that does it is not to end them all
PATIENCE_S = 30.0  # until the log says what is waited for

log = logging.getLogger(__name__)


class _Worker:
    """One process on some machine. Its warnings are told where the command was given."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work, self.told = work, threading.local()
        logging.getLogger().addHandler(_Kept(self.told))

    def here(self) -> None:
        """Ends when the worker has started."""

    def do(self, job: Any) -> tuple[Any, list[tuple[str, int, str]], UserError | None]:
        """What the work gave, its warnings as (logger, level, message), and its complaint."""
        self.told.records = []
        try:
            return self.work(job), self.told.records, None
        except UserError as error:
            return None, self.told.records, error


class _Kept(logging.Handler):
    def __init__(self, told: threading.local) -> None:
        super().__init__(logging.WARNING)
        self.told = told

    def emit(self, record: logging.LogRecord) -> None:
        getattr(self.told, "records", []).append((record.name, record.levelno, record.getMessage()))


def deal(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    machines: Sequence[Machine],
    *,
    use_gpus: bool = False,
    together: int = 1,
) -> Iterator[Result]:
    """What the work makes of each job, in order, by workers on all machines: one per GPU where they are used and there are
    some, else one per CPU.

    work: copied once to each worker. together: jobs that a worker has at a time, in as many threads. A worker that dies is
    replaced, and its jobs are done again by whichever is free first, so that a job may be done twice. The first UserError of a
    job is raised here. Stopped for a job that ends several workers (it is named by its `name`, or as a text), and where none
    starts.
    """
    import ray
    from ray.exceptions import OutOfMemoryError, RayActorError

    gpus = sum(machine.gpus for machine in machines) if use_gpus else 0
    room = int(gpus or sum(machine.cpus for machine in machines))
    worker = ray.remote(_Worker).options(num_cpus=1, num_gpus=1 if gpus else 0, max_concurrency=together)
    copied = ray.put(work)
    waiting, lost, workers = deque(range(len(jobs))), Counter[int | None](), set[Any]()
    busy = Counter[Any]()  # jobs of each worker that has started
    running: dict[Any, tuple[Any, int | None]] = {}  # by Ray's reference: a worker and its job, or None while it starts
    done: dict[int, Result] = {}

    def start() -> None:
        new: Any = worker.remote(copied)
        workers.add(new)
        running[new.here.remote()] = (new, None)

    def give_out() -> None:
        while waiting and busy and min(busy.values()) < together:
            chosen, job = min(busy, key=busy.__getitem__), waiting.popleft()
            busy[chosen] += 1
            running[chosen.do.remote(jobs[job])] = (chosen, job)

    def lose(at: Any, job: int | None, error: Exception) -> None:
        lost[job] += 1
        if lost[job] >= ATTEMPTS:
            what, code = "workers do not start on Ray", OUTAGE
            if job is not None:
                name = getattr(jobs[job], "name", jobs[job])
                what, code = f"{name} ended {ATTEMPTS} workers one after the other", FAULT
            raise Stopped(f"{what} ({first_line(error)}): see Ray's logs", code) from error
        if job is not None:
            waiting.appendleft(job)
        if at in workers:  # the first that is heard of its end
            log.warning("a worker is lost (%s): what it had is done again", first_line(error))
            workers.remove(at)
            del busy[at]
            _end(at)  # which may be out of reach and alive
            start()

    try:
        for _ in range(min(max(1, room), len(jobs))):
            start()
        for number in range(len(jobs)):
            while number not in done:
                give_out()
                ended, _ = ray.wait(list(running), num_returns=1, timeout=PATIENCE_S)
                if not ended:
                    if not busy:
                        log.info("waiting for Ray to have a free %s", "GPU" if gpus else "CPU")
                    continue
                reference = ended[0]
                at, job = running.pop(reference)
                try:
                    answer = ray.get(reference)
                except (RayActorError, OutOfMemoryError) as error:
                    lose(at, job, error)
                    continue
                if job is None:
                    busy[at], lost[None] = 0, 0
                    continue
                if at in workers:
                    busy[at] -= 1
                done[job] = _told(*answer)
            yield done.pop(number)
    finally:
        for each in workers:
            _end(each)


def _end(worker: Any) -> None:
    import ray

    with suppress(Exception):
        ray.kill(worker)


def _told(result: Result, warnings: Sequence[tuple[str, int, str]], complaint: UserError | None) -> Result:
    for name, level, message in warnings:
        logging.getLogger(name).log(level, "%s", message)
    if complaint is not None:
        raise complaint
    return result
