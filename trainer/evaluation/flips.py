"""The flip matrix: which classes a translation turns into which, the segmenter's own errors taken off.

docs/evaluation.md discusses the definition.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.errors import UserError
from trainer.evaluation.confusion import NONE, ConfusionMatrix

WORST_PAIRS = 10
# Metrics of their own: what street scenes with more vegetation in the target than in the source are flipped into.
NAMED_PAIRS = (("sky", "vegetation"), ("building", "vegetation"))


@dataclass(frozen=True)
class Pair:
    """Class `true` is seen as `seen` in the translation more often than in real target images.

    excess: by how much, as a share of the true class's pixels. of_all: as a share of all compared pixels.
    """

    true: str
    seen: str
    excess: float
    of_all: float

    def __str__(self) -> str:
        """Such as "sky → vegetation 18 % of sky, 3.6 % of all pixels"."""
        shares = f"{_percent(self.excess)} of {self.true}, {_percent(self.of_all)} of all pixels"
        return f"{self.true} → {self.seen} {shares}"


@dataclass(frozen=True)
class Flips:
    """How a translation flips classes.

    rate: the flip rate in [0, 1]: the share of the compared pixels that the translation made look like another class.
    matrix: the excess F, float64 (C, C + 1), rows true classes, columns seen classes and "none"; entries in [-1, 1],
    each row sums to 0; NaN in the rows of classes that could not be compared.
    pairs: those with a positive excess, the largest share of all pixels first.
    skipped: classes of the source that do not occur in the real target images, so that nothing is known of how well
    the segmenter sees them there.
    """

    classes: tuple[str, ...]
    rate: float
    matrix: np.ndarray
    pairs: tuple[Pair, ...]
    skipped: tuple[str, ...]

    def metrics(self) -> dict[str, Any]:
        """{"flip_rate": …, "sky_to_vegetation": …, "flips": the ten worst pairs, "skipped": […]}, ready for JSON. Of
        NAMED_PAIRS, by `name_of`, the excess that `Pair` has, 0 where there is none; without those that could not be compared."""
        return {
            "flip_rate": self.rate,
            **self._named(),
            "flips": [dataclasses.asdict(pair) for pair in self.pairs[:WORST_PAIRS]],
            "skipped": list(self.skipped),
        }

    def _named(self) -> dict[str, float]:
        found = {}
        for true, seen in NAMED_PAIRS:
            if true in self.classes and seen in self.classes:
                excess = float(self.matrix[self.classes.index(true), self.classes.index(seen)])
                if not math.isnan(excess):
                    found[name_of(true, seen)] = max(0.0, excess)
        return found


def name_of(true: str, seen: str) -> str:
    """The metric of one pair of classes: MLflow takes no arrow in a name."""
    return f"{true}_to_{seen}"


def flips(translated: ConfusionMatrix, real: ConfusionMatrix) -> Flips:
    """What a segmenter sees in translations, compared with what the same segmenter sees in real target images.

    translated: true classes of the sources against the classes seen in their translations, giving P(p | t).
    real: true classes of real target images against the classes seen in them, giving R(p | t).
    The excess is F[t, p] = P(p | t) - R(p | t), "none" being one of the p, and the flip rate

        sum_t w_t sum_{p != t} max(0, F[t, p]),

    w_t being the share of t among the sources' labelled pixels whose class also occurs in the real target images. It is
    0 for a translator whose pictures the segmenter reads exactly as it reads real ones, however badly that is, and 1 if
    every pixel is seen as a class for which its true class is never taken in real images.

    Each pair is clamped by itself, so a pair that is confused less often than in real images does not make up for one
    that is confused more often, and what is noise in F adds a little to the rate.

    UserError if no class occurs in both.
    """
    classes = translated.classes
    assert classes == real.classes
    pixels, reference = translated.counts.sum(axis=1), real.counts.sum(axis=1)
    compared = (pixels > 0) & (reference > 0)
    if not compared.any():
        raise UserError(
            "no class occurs both in the source's labels and in those of the real target images, so flips cannot be "
            "measured: evaluate on labelled splits of one label space"
        )
    weight = np.where(compared, pixels, 0) / pixels[compared].sum()
    matrix = translated.rates() - real.rates()  # NaN wherever either has no pixel
    risen = np.nan_to_num(matrix).clip(min=0)
    np.fill_diagonal(risen, 0)
    of_all = weight[:, None] * risen
    names = (*classes, NONE)
    pairs = [Pair(names[t], names[p], float(risen[t, p]), float(of_all[t, p])) for t, p in np.argwhere(risen > 0)]
    return Flips(
        classes=classes,
        rate=float(of_all.sum()),
        matrix=matrix,
        pairs=tuple(sorted(pairs, key=lambda pair: -pair.of_all)),
        skipped=tuple(classes[t] for t in np.flatnonzero((pixels > 0) & (reference == 0))),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"
