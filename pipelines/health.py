"""What happened to the data so far in this process: retries, evictions, what could not be used."""

import logging
import threading

log = logging.getLogger(__name__)


class DataHealth:
    """Counts of what the data plane had to cope with. Safe to use from several threads.

    retries: requests to the store, or whole fetches, that had to be repeated. evictions: shards removed from the cache
    to make room. fetched_bytes: what was brought here from the store. bad_shards, bad_samples: {name: reason} of those
    that could not be used.
    """

    def __init__(self) -> None:
        self.retries = 0
        self.evictions = 0
        self.fetched_bytes = 0
        self.bad_shards: dict[str, str] = {}
        self.bad_samples: dict[str, str] = {}
        self._guard = threading.Lock()

    def count_retry(self) -> None:
        """One more repeated request; the log has the 1st, 10th, 100th, …, so that a long outage does not fill it."""
        with self._guard:
            self.retries += 1
            retries = self.retries
        if str(retries).strip("0") == "1":
            log.warning("the store of the data has failed to answer: retry %d", retries)

    def count_eviction(self) -> None:
        with self._guard:
            self.evictions += 1

    def count_fetched(self, bytes: int) -> None:
        with self._guard:
            self.fetched_bytes += bytes

    def bad_shard(self, name: str, reason: str) -> None:
        """A shard cannot be used; the log has it the first time."""
        self._note(self.bad_shards, "shard", name, reason)

    def bad_sample(self, name: str, reason: str) -> None:
        """A sample cannot be used; the log has it the first time."""
        self._note(self.bad_samples, "sample", name, reason)

    def _note(self, known: dict[str, str], kind: str, name: str, reason: str) -> None:
        with self._guard:
            new = name not in known
            known.setdefault(name, reason)
        if new:
            log.warning("bad %s %s: %s", kind, name, reason)

    def metrics(self) -> dict[str, float]:
        """The counts under the names that metrics have; fetched_MiB in units of 2^20 bytes."""
        with self._guard:
            return {
                "data/retries": self.retries,
                "data/evictions": self.evictions,
                "data/fetched_MiB": self.fetched_bytes / 2**20,
                "data/bad_shards": len(self.bad_shards),
                "data/bad_samples": len(self.bad_samples),
            }
