"""The ranks of a run end together."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from infra.errors import Stopped
from infra.signals import current
from launch.runs.lock import RunLock
from trainer.engines import Engine


def together(engine: Engine, work: Callable[[RunLock], Path]) -> Path:
    """What all ranks do: they end together, since a launcher takes the end of one, other than by code 0, for a fault and
    sends the others a signal. One that raises ends all."""
    lock = RunLock()
    try:
        result = work(lock)
    except BaseException as error:
        raised = judged(engine, error)
        if raised is error and isinstance(raised, Stopped) and current().told:
            raised.said = raised.said or engine.rank > 0
            _meet(engine)
        if raised is error:
            raise
        raise raised from None
    else:
        current().settle()
        _meet(engine)
        return result
    finally:
        lock.release()
        current().over()


def judged(engine: Engine, error: BaseException) -> BaseException:
    """What to raise in the place of what ends a rank."""
    current().settle()
    return engine.peers.judge(error) if engine.peers else error


def _meet(engine: Engine) -> None:
    with suppress(RuntimeError):  # some have ended: so does this one
        engine.any(False)
