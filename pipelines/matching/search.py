"""The nearest target crops of every source crop: exact, in blocks, by products of matrices."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

ROWS = {"cpu": 512, "cuda": 8192}  # source cells compared at once: the block of distances stays in a CPU's cache
_GROUP = 32  # candidates of which only the least distance is looked at first
_FAR = 2**24  # above every distance


def nearest(source: np.ndarray, blocks: Iterable[tuple[int, np.ndarray]], k: int, device: torch.device) -> np.ndarray:
    """For each source cell the codes of its k nearest candidates, nearest first, the lower code first of two as near: int64
    (n, k).

    source: descriptors uint8 (n, d). blocks: descriptors of candidates uint8 (m, d) with the code of the first; codes count on
    inside a block. All blocks together hold k candidates or more. 3 d times the square of the largest value is below 2^24.
    """
    best: Tensor | None = None
    rows = torch.from_numpy(source).to(device, torch.float32)
    for first_code, candidates in blocks:
        block = torch.from_numpy(candidates).to(device, torch.float32)
        found = torch.cat([_nearest(part, block, k) for part in rows.split(ROWS[device.type])]) + first_code
        best = found if best is None else torch.cat([best, found], 1)
        if best.shape[1] > k:
            best = best.topk(k, largest=False).values
    assert best is not None and best.shape[1] == k
    return (best.sort().values & (2**31 - 1)).cpu().numpy()


def _nearest(source: Tensor, block: Tensor, k: int) -> Tensor:
    """The keys, distance x 2^31 + place in the block, of the (at most) k nearest: int64 (n, k), in no order.

    The k nearest lie in the k groups whose nearest are the nearest: of all others only the least distance is computed.
    The distance lacks the source's own square, which is the same for all of its candidates.
    """
    n, m = len(source), len(block)
    groups = -(-m // _GROUP)
    padded = torch.nn.functional.pad(block, (0, 0, 0, groups * _GROUP - m))
    squares = padded.square().sum(1)
    squares[m:] = _FAR
    distance = torch.addmm(squares, source, padded.T, alpha=-2).view(n, groups, _GROUP)
    least = _keys(distance.amin(2), torch.arange(groups, device=source.device))
    kept = least.topk(min(k, groups), largest=False).indices
    near = distance.gather(1, kept[..., None].expand(-1, -1, _GROUP))
    places = kept[..., None] * _GROUP + torch.arange(_GROUP, device=source.device)
    keys = _keys(near, places).flatten(1)
    return keys.topk(min(k, m), largest=False).values


def _keys(distance: Tensor, places: Tensor) -> Tensor:
    """Whole numbers that sort by distance, then by place."""
    return distance.to(torch.int64) * 2**31 + places
