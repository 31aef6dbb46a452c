"""Mutated files, the same for each seed: flipped, lost and doubled bytes, and JSON in which values have been exchanged."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**63, 10**400, 0.5, float("nan"), float("inf"), "", "x", "../../etc/passwd", "0" * 64,
    [], {}, [[]], [0, 0], {"": 0}, "\udcff\x00",
)  # fmt: skip


def mutations(original: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` files unlike the JSON file that they come from."""
    draw, made = random.Random(seed), 0
    while made < count:
        mutated = draw.choice((_bytes, _value, _value))(original, draw)
        if mutated != original:
            made += 1
            yield mutated


def _bytes(original: bytes, draw: random.Random) -> bytes:
    data, place = bytearray(original), draw.randrange(len(original))
    match draw.randrange(5):
        case 0:
            data[place] ^= 1 << draw.randrange(8)
        case 1:
            del data[place : place + draw.choice((1, 1, 8, len(data)))]
        case 2:
            data[place:place] = data[place : place + draw.choice((1, 20))]
        case 3:
            data[place] = draw.choice(b'0123456789-.eE"{}[],:\x00\xff')
        case _:
            data = bytearray(b"[" * 100_000 if draw.random() < 0.02 else bytes(len(data)))
    return bytes(data)


def _value(original: bytes, draw: random.Random) -> bytes:
    """One value is another one, of this file or a strange one, or is gone."""
    tree = json.loads(original)
    places = list(_places(tree))
    holder, key = draw.choice(places)
    other_holder, other_key = draw.choice(places)
    match draw.randrange(4):
        case 0:
            del holder[key]
        case 1:
            holder[key] = copy.deepcopy(other_holder[other_key])
        case 2 if type(holder[key]) is int:
            holder[key] += draw.choice((-512, -1, 1, 512))
        case _:
            holder[key] = draw.choice(STRANGE)
    return json.dumps(tree).encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)
