"""Exceptions that end the program with one sentence, and what an entry script does with them."""

import errno
import functools
import logging
import os
import sys
from collections.abc import Callable

import infra.signals  # noqa: F401  # first of all, since it notes who started this process
from infra.redaction import redacted

# Exit codes: docs/operations.md says what a restart policy makes of them.
FAULT = 1  # of the program
EXIT_USER_ERROR = 2
DIVERGED = 3  # of a training whose numbers are no longer finite
OUTAGE = 75  # a store, a disk or a rank was away: the same command may go on later
INTERRUPTED = 130  # 128 + SIGINT: what was trained is saved
TERMINATED = 143  # 128 + SIGTERM: the same


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # what a disk says that may be mended while a run waits


class UserError(ValueError):
    """A mistake the user can mend. The message is one sentence that names the thing and the remedy."""


class Stopped(Exception):
    """The program ends early for a reason that is no mistake of the user's; the message says how to go on. said: whether it is
    on the screen already, from another rank."""

    def __init__(self, message: str, exit_code: int, *, said: bool = False) -> None:
        super().__init__(message)
        self.exit_code, self.said = exit_code, said


def exit_code_of(error: BaseException) -> int:
    """What a program ends with that this ends."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, OSError) and error.errno in FULL:
        return OUTAGE
    return int(getattr(error, "exit_code", EXIT_USER_ERROR if isinstance(error, UserError) else FAULT))


def exits_cleanly(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap the main function of an entry script: a UserError becomes one line on stderr and exit code 2, Stopped one
    line and its own code. Names are UTF-8 in it, whatever the locale."""

    @functools.wraps(main)
    def wrapped() -> None:
        if main.__module__ == "__main__":
            _begin_in_utf8()
        code = 0
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        try:
            main()
        except (UserError, Stopped) as error:
            if not getattr(error, "said", False):
                print(f"error: {redacted(str(error))}", file=sys.stderr, flush=True)
            code = exit_code_of(error)
        except KeyboardInterrupt as error:
            print("error: interrupted", file=sys.stderr, flush=True)
            code = exit_code_of(error)
        except Exception as error:
            code = exit_code_of(error)
            if code == OUTAGE:
                print(
                    f"error: {redacted(str(error))}: make room or wait, the same command goes on",
                    file=sys.stderr,
                    flush=True,
                )
            elif several:
                sys.excepthook(type(error), error, error.__traceback__)
            else:
                raise
        if several:
            # Everything is closed by now. The interpreter's own end would race with the communication threads of
            # the launcher's other ranks, which now and then turns the exit code into that of an abort.
            logging.shutdown()
            sys.stdout.flush()
            os._exit(code)
        if code:
            sys.exit(code)

    return wrapped


def _begin_in_utf8() -> None:
    """Where Python has another encoding from the environment, such as LC_ALL=C, begin this program anew without that: names in
    options, of files and in what is written would be others than on other machines."""
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"  # for programs that this one starts
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line of at most 160 characters."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 160 else line[:160] + "…"
