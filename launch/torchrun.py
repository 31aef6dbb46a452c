"""torchrun with the exit code of the ranks: python launch/torchrun.py --nnodes 2 … launch/train.py --task gta2city …

All options, and the PET_* variables that stand for them, are torchrun's. torchrun itself ends with 1 whatever its ranks ended
with, so whoever restarts jobs could not tell a mistake from a machine that went away; and it does not take in a machine that
comes back.
"""

import signal
import sys
from collections.abc import Iterable
from types import FrameType
from typing import NoReturn

from torch.distributed import DistError, Store
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousInfo
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.run import parse_args, run

from infra.errors import DIVERGED, EXIT_USER_ERROR, OUTAGE, Stopped, exits_cleanly, first_line

# Where ranks of one machine end apart: what restarting cannot mend first, then what the others ended of.
MOST_TELLING = (EXIT_USER_ERROR, DIVERGED, 1, 143, 130)


def exit_code(codes: Iterable[int]) -> int:
    """What a machine's ranks ended with, as one exit code. codes: at least one, none of them 0; of a rank that a signal
    ended, minus its number."""
    own = [code if code > 0 else 128 - code for code in codes]
    return next((code for code in MOST_TELLING if code in own), min(own, key=lambda code: code == OUTAGE))


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(f"signal {number} before there was a rank: the same command starts again", 128 + number)


def take_in_late_machines() -> None:
    """In each round of its rendezvous torch 2.13 asks rank 0's machine where the ranks' store is, which answers in the first
    one alone: a machine that comes in later waits for a minute, and gives up. So it answers in each round, with the one store
    that it has made: what ranks have kept there outlives them."""
    join, make = DynamicRendezvousHandler.next_rendezvous, DynamicRendezvousHandler._create_tcp_store_server

    def next_rendezvous(self: DynamicRendezvousHandler) -> RendezvousInfo:
        self._bootstrap_store_info = None
        return join(self)

    def create_once(self: DynamicRendezvousHandler, address: str, port: int) -> Store:
        return self._shared_tcp_store_server or make(self, address, port)

    DynamicRendezvousHandler.next_rendezvous = next_rendezvous  # type: ignore[method-assign]
    DynamicRendezvousHandler._create_tcp_store_server = create_once  # type: ignore[method-assign,assignment]


@exits_cleanly
def main() -> None:
    take_in_late_machines()
    arguments = parse_args(sys.argv[1:])
    # torchrun listens only while it has ranks; as the first process of a container it would not end before.
    signal.signal(signal.SIGTERM, _stop)
    try:
        run(arguments)
    except ChildFailedError as error:
        code = exit_code(failure.exitcode for failure in error.failures.values())
        ranks = ", ".join(f"{rank} ({failure.exitcode})" for rank, failure in sorted(error.failures.items()))
        raise Stopped(f"ended by its ranks (exit codes): {ranks}", code) from None
    except SignalException as error:
        raise Stopped(f"stopped by {error.sigval.name}, and its ranks with it", 128 + error.sigval) from None
    except (RendezvousError, DistError) as error:
        raise Stopped(
            f"another machine is not there, or went away ({first_line(error)}): start again", OUTAGE
        ) from None


if __name__ == "__main__":
    main()
