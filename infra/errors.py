"""Exceptions that end the program with one sentence, and what an entry script does with them."""

import errno
import functools
import logging
import os
import sys
from collections.abc import Callable

from infra.redaction import redacted

EXIT_USER_ERROR = 2
OUTAGE = 75  # a store or a disk was away or full: the same command may go on later
DIVERGED = 3  # the exit code of a training whose numbers are no longer finite


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # what a disk says that may be mended while a run waits


class UserError(ValueError):
    """A mistake the user can mend. The message is one sentence that names the thing and the remedy."""


class Stopped(Exception):
    """The program ends early for a reason that is no mistake of the user's; the message says how to go on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def exits_cleanly(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap the main function of an entry script: a UserError becomes one line on stderr and exit code 2, Stopped one
    line and its own code."""

    @functools.wraps(main)
    def wrapped() -> None:
        code = 0
        try:
            main()
        except (UserError, Stopped) as error:
            print(f"error: {redacted(str(error))}", file=sys.stderr, flush=True)
            code = getattr(error, "exit_code", EXIT_USER_ERROR)
        except OSError as error:
            if error.errno not in FULL:
                raise
            print(
                f"error: {redacted(str(error))}: make room or wait, the same command goes on",
                file=sys.stderr,
                flush=True,
            )
            code = OUTAGE
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            # Everything is closed by now. The interpreter's own end would race with the communication threads of
            # the launcher's other ranks, which now and then turns the exit code into that of an abort.
            logging.shutdown()
            sys.stdout.flush()
            os._exit(code)
        if code:
            sys.exit(code)

    return wrapped


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line of at most 160 characters."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 160 else line[:160] + "…"
