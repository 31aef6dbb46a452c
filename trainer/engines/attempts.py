"""The store through which the ranks of one attempt find each other, where a launcher may start them again."""

import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store

POLL_S = 0.05


def of_this_attempt(store: Store, rank: int, world_size: int, patience: timedelta) -> PrefixStore:
    """A part of the launcher's store that no earlier attempt has written to, the same on all ranks.

    torchrun keeps its store from one attempt to the next, and with it the addresses of processes that have ended. Restarts are
    not counted alike on all nodes, so rank 0 makes up a name, and gives it to whoever asks under a name of its own: what was
    asked in an earlier attempt is answered as well, and nobody reads it. RuntimeError if not all ask in time.
    """
    own = uuid.uuid4().hex
    deadline = time.monotonic() + patience.total_seconds()

    def pause() -> None:  # not the store's own waiting, which no signal interrupts
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all of {world_size} ranks were there within {patience}")
        time.sleep(POLL_S)

    if rank > 0:
        store.set(f"asks/{rank}", own)
        while not store.check([f"answer/{own}"]):
            pause()
        name = store.get(f"answer/{own}").decode()
        store.add(f"joined/{name}", 1)
        return PrefixStore(name, store)
    answered: set[str] = set()
    while store.add(f"joined/{own}", 0) < world_size - 1:
        for other in range(1, world_size):
            if store.check([f"asks/{other}"]) and (asked := store.get(f"asks/{other}").decode()) not in answered:
                store.set(f"answer/{asked}", own)
                answered.add(asked)
        pause()
    return PrefixStore(own, store)
