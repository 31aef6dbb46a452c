"""What a person watching a run sees: log lines and one progress line that never tear each other."""

import io
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from traceback import format_exception
from types import TracebackType
from typing import Any

from tqdm import tqdm

from infra.redaction import redacted

PACKAGES = ("infra", "pipelines", "trainer", "launch", "tuning", "__main__")
PLAIN_INTERVAL_S = 10.0  # between progress lines where the output is not a terminal
TERMINAL_INTERVAL_S = 0.1

log = logging.getLogger(__name__)


class _ConsoleHandler(logging.Handler):
    """Writes to the stderr of the moment through tqdm, which lifts a progress line away and redraws it below."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class _ShortFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def setup_logging(log_file: Path | None, rank: int = 0) -> None:
    """Send this project's messages from INFO up, and every library's warnings, to stderr and to `log_file`.

    Only rank 0 tells INFO on the console; other ranks show warnings. The file is appended to (a resumed run goes on
    in the same log) and gets full lines with time and origin; pass None on the ranks that keep no file. May be called
    again, for example once the run folder is known: the last call holds. Nothing, not even a traceback, shows a password.
    """
    sys.excepthook = _show_traceback
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if getattr(handler, "_srunit", False):
            root.removeHandler(handler)
            handler.close()

    console = _ConsoleHandler(logging.INFO if rank == 0 else logging.WARNING)
    console.setFormatter(_ShortFormatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    handlers: list[logging.Handler] = [console]
    if log_file is not None:
        file = logging.FileHandler(log_file, encoding="utf-8")
        file.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(file)
    for handler in handlers:
        handler._srunit = True  # type: ignore[attr-defined]
        root.addHandler(handler)

    # Libraries speak from WARNING up, so none has to be quietened by name.
    root.setLevel(logging.WARNING)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.DEBUG)  # which is for files


def _show_traceback(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    print(redacted("".join(format_exception(kind, error, traceback))), end="", file=sys.stderr, flush=True)


class ProgressLine(tqdm):
    """One line: percent, step, losses, rate, time left.

    On a terminal it is redrawn in place; elsewhere (a file, a pipe, a cluster's log) it becomes a plain log line every
    ten seconds. Use as a context manager, or call close() at the end.

    total, initial: optimisation steps of the whole run, and those done before this start.
    batch, unit: what one step takes, so many "pairs" or "images"; the rate shown is of these.
    title: what a step is called. leave: whether the line stays on a terminal once it is closed.
    enabled: False on ranks above 0, which then print nothing.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        *,
        batch: int = 1,
        unit: str = "pairs",
        title: str = "step",
        leave: bool = True,
        enabled: bool = True,
    ) -> None:
        self._terminal = sys.stderr.isatty()
        self._batch = batch
        self._losses = ""
        self._logged_step = initial  # nothing is known before the first step
        super().__init__(
            total=total,
            initial=initial,
            disable=not enabled,
            leave=leave,
            file=sys.stderr if self._terminal else io.StringIO(),  # display() logs instead
            mininterval=TERMINAL_INTERVAL_S if self._terminal else PLAIN_INTERVAL_S,
            miniters=1,
            dynamic_ncols=self._terminal,
            bar_format=f"{{percentage:5.1f}}%  {title} {{n}}/{{total}}{{losses}}  {{per_s}} {unit}/s  {{remaining}} left",
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        fields = super().format_dict
        rate = fields["rate"]
        if rate is None and fields["elapsed"] and fields["n"] > fields["initial"]:
            rate = (fields["n"] - fields["initial"]) / fields["elapsed"]
        fields["losses"] = self._losses
        fields["per_s"] = f"{rate * self._batch:.3g}" if rate else "?"
        return fields

    def advance(self, losses: Mapping[str, float] | None = None) -> None:
        """One more step is done. Pass losses when they are on the host already; the last ones stay on the line."""
        if losses is not None:
            self._losses = "".join(f"  {name} {value:.3f}" for name, value in losses.items())
        self.update(1)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self._terminal:
            return bool(super().display(msg, pos))
        if self.n > self._logged_step:  # close() shows the last step, which may have been shown
            self._logged_step = self.n
            log.info(str(self))
        return True
