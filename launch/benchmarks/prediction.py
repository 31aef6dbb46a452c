"""How long a step would take on a GPU that is not there, from what it asks for: calls, bytes and FLOPs, counted by `Calls`.

The host takes `CALL_S` for each operator call, and meanwhile the device computes: a step takes the longer of both. The device
takes, for products, the longer of their FLOPs at the reachable matrix rate and their bytes at the reachable bandwidth; for
all other kinds of work their bytes; and for each call at least `KERNEL_S`. Compiled, what lies between convolutions is taken to
move the share `FUSED` of its bytes in as large a share of the calls.
"""

from collections.abc import Mapping
from dataclasses import dataclass

CALL_S = 5e-6  # of the host, in eager mode: forward, backward and autograd's bookkeeping
KERNEL_S = 2e-6  # from the beginning of one kernel to that of the next
FUSED = 0.5
PRODUCTS = ("convolution", "product")


@dataclass(frozen=True)
class Card:
    """Nominal dense bf16 FLOPs and bytes a second, and the shares of them that a large product and a large copy reach."""

    name: str
    flops: float
    bytes: float
    reached_flops: float = 0.7
    reached_bytes: float = 0.85


CARDS = (Card("H100 SXM", 989e12, 3.35e12), Card("H200", 989e12, 4.8e12))


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step: of the host and the device in eager mode, and of the device alone with its calls fused and replayed."""

    host: float
    device: float
    fused: float

    @property
    def eager(self) -> float:
        return max(self.host, self.device)


def predict(card: Card, calls: Mapping[str, int], moved: Mapping[str, int], flops: float) -> Prediction:
    """calls, moved: operator calls and bytes of a step by kind. flops: of its products."""
    rate, bandwidth = card.flops * card.reached_flops, card.bytes * card.reached_bytes
    products = max(flops / rate, sum(moved.get(kind, 0) for kind in PRODUCTS) / bandwidth)
    others = [kind for kind in calls if kind not in PRODUCTS]
    rest = sum(max(moved.get(kind, 0) / bandwidth, calls[kind] * KERNEL_S) for kind in others)
    fused = sum(FUSED * max(moved.get(kind, 0) / bandwidth, calls[kind] * KERNEL_S) for kind in others)
    return Prediction(sum(calls.values()) * CALL_S, products + rest, products + fused)
