"""Whether a training has collapsed, told from its own losses. The numbers of the rule are here alone.

Two signs, each a mean over the last WINDOW steps in multiples of what a network has that only guesses (`Guesses`):
D has won if its losses are below WON: it tells every patch apart, and G, whose adversarial loss stays at its maximum, is
pulled by its other losses alone. The heads have collapsed if PatchNCE is above LOST: no patch is told from another.

WON and WINDOW are from thirteen runs at a strong mismatch (up to 1,200 steps, lsgan): six had such D's, and five of them
translated worse than doing nothing at the next evaluation, the sixth hardly better; the others always did better. Over 200 steps
three of the five are found. LOST is from arithmetic, since the heads of none collapsed: 95 % of ln 256 is the loss of a network
that has ruled out a quarter of 256 patches.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainer.methods.base import Guesses

WINDOW = 100  # steps
SETTLING = 200  # steps at the beginning that do not count: D and the heads learn faster than G then
WON = 0.08
GONE = 0.16  # D's losses have to rise above this before they count anew
LOST = 0.95


@dataclass(frozen=True)
class Sign:
    """What was found. began: the first step of the window in which it was."""

    words: str
    began: int


class _Watched:
    """The sum of some losses in multiples of that of their guesses."""

    def __init__(self, guesses: Mapping[str, float], contrast: bool) -> None:
        self.guesses, self.contrast = guesses, contrast
        self.shares: deque[float] = deque(maxlen=WINDOW)
        self.shown = False

    def add(self, row: Mapping[str, float]) -> None:
        if row["step"] > SETTLING and all(name in row for name in self.guesses):
            self.shares.append(sum(row[name] for name in self.guesses) / sum(self.guesses.values()))

    @property
    def share(self) -> float:
        """nan before there is a whole window."""
        return sum(self.shares) / WINDOW if len(self.shares) == WINDOW else math.nan

    def words(self) -> str:
        names = " and ".join(self.guesses)
        found = f"{names} {'is' if len(self.guesses) == 1 else 'are'} at {self.share:.0%} of a guess"
        if self.contrast:
            return f"the heads have collapsed, and tell no patch from another ({found}"
        return f"D has won, and tells translations from targets without fail ({found}"


class Watch:
    """Sees the metrics of a run, row by row, and says once when a sign begins; again only if it was gone in between."""

    def __init__(self, guesses: Guesses) -> None:
        self._watched = [_Watched(each, False) for each in guesses.discriminators]
        self._watched += [_Watched({name: value}, True) for name, value in guesses.contrasts.items()]

    def see(self, rows: Sequence[Mapping[str, float]]) -> Iterator[Sign]:
        for row in rows:
            for each in self._watched:
                each.add(row)
                there = each.share > LOST if each.contrast else each.share < (GONE if each.shown else WON)
                if there and not each.shown:
                    first = int(row["step"]) - WINDOW + 1
                    yield Sign(f"{each.words()} over steps {first} to {int(row['step'])})", first)
                each.shown = there
