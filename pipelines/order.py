"""Which sample comes when: pure functions of (seed, domain, global position).

Slot s of training step t in a global batch of GB pairs is position p = t * GB + s of both domains. The sample at a
position, and how it is cut (pipelines/cuts.py), are drawn from a counter-based generator (Philox 4x64-10; Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), keyed by the seed and the name of the draw and set to the
position. No state is carried from one draw to the next, so the run is the same for any number of ranks and threads,
and resuming it is setting one integer.
"""

import hashlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from infra.errors import UserError

# A rank's slots of one step seldom cross more than one window boundary; two more windows cost little.
_WINDOWS_KEPT = 4
# A lost shard is replaced hundreds of times. Drawn from all shards, each time might wait for a whole shard to arrive.
_NEAR_ATTEMPTS = 10


def random_words(seed: int, stream: str, counter: tuple[int, int], count: int) -> np.ndarray:
    """`count` uniform 64-bit words (uint64) that depend on nothing but the arguments.

    stream: the name of the draw, e.g. "samples/source"; streams are independent of each other.
    counter: two integers in [0, 2^64), e.g. (epoch, window).

    Raw Philox output is used, since numpy keeps bit streams stable across versions, but not what its distributions
    make of them (NEP 19).
    """
    high, low = counter
    # The lowest of the four counter words is left to the generator's own blocks of output.
    place: Any = {"counter": np.array([0, low, high, 0], np.uint64), "key": _key(seed, stream)}
    generator = _generator()
    generator.state = {**_FRESH, "state": place}
    return generator.random_raw(count)


_FRESH = np.random.Philox(0).state  # nothing drawn yet
_of_thread = threading.local()


def _generator() -> np.random.Philox:
    """This thread's, to be set to a place: to make one takes several times as long."""
    if not hasattr(_of_thread, "philox"):
        _of_thread.philox = np.random.Philox(0)
    return _of_thread.philox


@lru_cache  # a run has a few streams, and draws from them for every sample
def _key(seed: int, stream: str) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest(), "<u8")


def permutation(seed: int, stream: str, counter: tuple[int, int], size: int) -> np.ndarray:
    """A uniform permutation of range(size), int64: the order of `size` random words."""
    return np.argsort(random_words(seed, stream, counter, size), kind="stable")


@dataclass(frozen=True)
class _Window:
    """`window` consecutive shards of an epoch's shard order, their samples permuted together."""

    shards: np.ndarray  # shard indices, in reading order
    starts: list[int]  # of each shard's samples, counted inside the window
    order: np.ndarray


class SampleOrder:
    """The endless order of one domain's samples: in every epoch each sample exactly once.

    An epoch permutes the shards, then permutes the samples within windows of consecutive shards of that list: reading
    stays local, and memory holds an epoch's shard order and a few windows, whatever the number of samples.

    shard_sizes: samples in each shard. seed: the run's. domain: names the stream, "source" or "target".
    window: shards whose samples are mixed; with at least as many as there are shards, the shuffle is uniform.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, domain: str, window: int) -> None:
        assert sum(shard_sizes) > 0 and window > 0
        self.samples = int(sum(shard_sizes))
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._seed = seed
        self._domain = domain
        self._window = window
        self._epochs: OrderedDict[int, tuple[np.ndarray, list[int]]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()

    def locate(self, position: int) -> tuple[int, int]:
        """(shard index, sample index in that shard) at a global position >= 0; the epoch is position // samples."""
        epoch, window_index, offset = self._find(position)
        window = self._open_window(epoch, window_index)
        sample = int(window.order[offset])
        place = bisect_right(window.starts, sample) - 1
        return int(window.shards[place]), sample - window.starts[place]

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """(shard index, sample index) of the attempt-th sample, from 1 on, to take the place of one that cannot be had.

        The first few are drawn uniformly from `upcoming_shards`, which are at hand, the later ones from all shards.
        """
        near = np.array(self.upcoming_shards(position)) if attempt <= _NEAR_ATTEMPTS else np.arange(len(self._sizes))
        ends = np.cumsum(self._sizes[near])
        (word,) = random_words(self._seed, f"replacement/{self._domain}", (attempt, position), 1)
        sample = int(word) * int(ends[-1]) >> 64
        place = int(np.searchsorted(ends, sample, side="right"))
        return int(near[place]), sample - int(ends[place] - self._sizes[near[place]])

    def upcoming_shards(self, position: int) -> list[int]:
        """The shards of the window that holds `position` and of the window after it, in reading order."""
        epoch, window_index, _ = self._find(position)
        shards, starts = self._open_epoch(epoch)
        begin = window_index * self._window
        upcoming = shards[begin : begin + 2 * self._window]
        if window_index == len(starts) - 1:
            upcoming = np.concatenate([upcoming, self._open_epoch(epoch + 1)[0][: self._window]])
        return list(dict.fromkeys(upcoming.tolist()))

    def _find(self, position: int) -> tuple[int, int, int]:
        """(epoch, window, place in the window) of a position."""
        epoch, offset = divmod(position, self.samples)
        _, starts = self._open_epoch(epoch)
        window_index = bisect_right(starts, offset) - 1
        return epoch, window_index, offset - starts[window_index]

    def _open_epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """(the epoch's shard order, the offset in the epoch at which each window starts)."""
        if epoch not in self._epochs:
            shards = permutation(self._seed, f"shards/{self._domain}", (epoch, 0), len(self._sizes))
            window_sizes = np.add.reduceat(self._sizes[shards], np.arange(0, len(shards), self._window))
            self._epochs[epoch] = shards, (np.cumsum(window_sizes) - window_sizes).tolist()
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _open_window(self, epoch: int, index: int) -> _Window:
        if (epoch, index) not in self._windows:
            shards = self._open_epoch(epoch)[0][index * self._window : (index + 1) * self._window]
            sizes = self._sizes[shards]
            order = permutation(self._seed, f"samples/{self._domain}", (epoch, index), int(sizes.sum()))
            self._windows[epoch, index] = _Window(shards, (np.cumsum(sizes) - sizes).tolist(), order)
            if len(self._windows) > _WINDOWS_KEPT:
                self._windows.popitem(last=False)
        return self._windows[epoch, index]


class FirstSample:
    """The order of a domain of which only the first sample is wanted. Methods: as of `SampleOrder`."""

    def locate(self, position: int) -> tuple[int, int]:
        return 0, 0

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        return 0, 0

    def upcoming_shards(self, position: int) -> list[int]:
        return [0]


def micro_batch_slots(global_batch: int, accumulation: int, rank: int, world_size: int) -> list[range]:
    """The slots of the global batch that fall to a rank, one range per micro-batch.

    Micro-batch m on rank r holds slots (m * world_size + r) * b … + b with b = global_batch / (world_size *
    accumulation), so the micro-batches of all ranks, in order, are the global batch. UserError if it does not divide.
    """
    parts = accumulation * world_size
    if global_batch % parts:
        raise UserError(
            f"a global batch of {global_batch} does not divide over {world_size} ranks x {accumulation} micro-batches: "
            f"make it a multiple of {parts}"
        )
    size = global_batch // parts
    starts = [(m * world_size + rank) * size for m in range(accumulation)]
    return [range(start, start + size) for start in starts]
