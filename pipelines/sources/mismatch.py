"""Unmatched statistics made of pairs: sources from one cluster of scenes, targets from the other (SRUNIT, supplement).

Appendix C clusters Cityscapes by the shares of the 19 classes and Google maps by the grey levels of the map; Appendix D
adds a share of the opposite cluster back. GTA5 and Cityscapes differ as they are, and the papers take all of them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from infra.errors import UserError
from pipelines.distributions import GREY_BINS, grey_histogram
from pipelines.labels import CLASSES, class_histogram
from pipelines.sources.base import Item, Source

# At which scenes are counted, (width, height) in pixels, whatever size they are prepared at: shares hardly depend on it.
LABEL_SIZE = (256, 128)
MAP_SIZE = (256, 256)
MIXED_MAPS = 10.0  # percent of each cluster of maps that the other side gets
VEGETATION = CLASSES.index("vegetation")


@dataclass(frozen=True)
class Mismatch:
    """seed: of K-means' beginnings and of what is drawn from the opposite cluster.
    add_opposite: percent of the opposite cluster that each side gets back, 0 to 100; what a smaller share adds is part
    of what a larger one does.
    """

    seed: int = 0
    add_opposite: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"the seed {self.seed} is impossible: give 0 or more, below 2^32")
        if not 0 <= self.add_opposite <= 100:
            raise UserError(f"{self.add_opposite:g} % of the opposite cluster cannot be added: give 0 to 100")


def unmatched_labels(source: Source, mismatch: Mismatch, progress: bool = True) -> Source:
    """The training pairs of labelled scenes in two clusters by their shares of the 19 classes (K-means, K = 2): the
    sources are those of one, the targets those of the other.

    The paper does not say which is which: here the sources' cluster is the one with less vegetation. Test images stay as
    they are. Reads every training label. UserError for unlabelled scenes, too few, or all of them alike.
    """

    def count(item: Item) -> np.ndarray:
        label = item.load(LABEL_SIZE)[1]
        if label is None:
            raise UserError(f"{item.name} has no label to cluster by: leave out --mismatch")
        return class_histogram(label)

    counts = _counted(source.splits["train/source"], count, progress)
    clusters, centres = _two_clusters(_shares(counts), mismatch.seed)
    of_sources = clusters == np.argmin(centres[:, VEGETATION])
    return _chosen(source, _members({"source": of_sources, "target": ~of_sources}, 0, mismatch), mismatch)


def unmatched_maps(source: Source, maps: str, mismatch: Mismatch, progress: bool = True) -> Source:
    """The training pairs of a map and a photo in two halves by the map's grey levels; the maps are those of one half, the
    photos those of the other, and each side gets a tenth of the other's besides.

    Pairs have histograms of 51 bins, K-means (K = 2) finds two centroids, the pairs are ranked by the ratio of their
    distances to the two, and either half of the ranking is a cluster. The paper does not say which is which: here the
    maps are those nearer to the brighter centroid, with less park and water.

    maps: the domain of the maps, "source" or "target"; for both, the same files become maps. Test pairs stay as they
    are. Reads every map. UserError for too few, or all of them alike, or more added than there is.
    """
    if MIXED_MAPS + mismatch.add_opposite > 100:
        raise UserError(
            f"{mismatch.add_opposite:g} % of the opposite cluster cannot be added to the {MIXED_MAPS:g} % that are mixed "
            f"in anyway: give 0 to {100 - MIXED_MAPS:g}"
        )
    counts = _counted(source.splits[f"train/{maps}"], _count_greys, progress)
    shares = _shares(counts)
    _, centres = _two_clusters(shares, mismatch.seed)
    dark, bright = centres[np.argsort(centres @ np.arange(GREY_BINS))]
    with np.errstate(divide="ignore"):  # a map may be its centroid
        ratio = np.linalg.norm(shares - bright, axis=1) / np.linalg.norm(shares - dark, axis=1)
    of_maps = np.ones(len(shares), bool)
    of_maps[np.argsort(-ratio, kind="stable")[: len(shares) // 2]] = False
    photos = "target" if maps == "source" else "source"
    members = _members({maps: of_maps, photos: ~of_maps}, MIXED_MAPS, mismatch)

    histograms = {f"train/{domain}": counts[mask].sum(axis=0) for domain, mask in members.items()}
    if source.paired:
        tested = _counted(source.splits[f"test/{maps}"], _count_greys, progress).sum(axis=0)
        histograms |= {"test/source": tested, "test/target": tested}
    return dataclasses.replace(
        _chosen(source, members, mismatch),
        grey_histograms={split: tuple(histogram.tolist()) for split, histogram in histograms.items()},
    )


def _count_greys(item: Item) -> np.ndarray:
    return grey_histogram(item.load(MAP_SIZE)[0])


def _counted(items: Sequence[Item], count: Callable[[Item], np.ndarray], progress: bool) -> np.ndarray:
    """The items' histograms, int64 (N, bins)."""
    return np.array([count(item) for item in tqdm(items, "counting", unit="image", disable=not progress)])


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / counts.sum(axis=1, keepdims=True).clip(1)


def _two_clusters(shares: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cluster (N,), 0 or 1, and centroids (2, bins) of K-means."""
    # Imported here, since the worker processes of a preparation import this module and have no use for a second of it.
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    if len(np.unique(shares, axis=0)) < 2:
        raise UserError(
            f"{len(shares)} training pair{'s' * (len(shares) != 1)} with the same statistics cannot be split in two: "
            f"leave out --mismatch, or give more pairs"
        )
    with threadpool_limits(1):  # several threads would add up in an order of their own
        found = KMeans(2, n_init=10, random_state=seed).fit(shares)
    return found.labels_, found.cluster_centers_


def _members(own: dict[str, np.ndarray], mixed: float, mismatch: Mismatch) -> dict[str, np.ndarray]:
    """Which pairs, bool (N,), each domain takes: its own cluster and the asked percentage of the other, drawn at random."""
    members = {}
    for place, (domain, mask) in enumerate(own.items()):
        others = np.random.default_rng([mismatch.seed, place]).permutation(np.flatnonzero(~mask))
        members[domain] = mask.copy()
        members[domain][others[: round(len(others) * (mixed + mismatch.add_opposite) / 100)]] = True
    return members


def _chosen(source: Source, members: dict[str, np.ndarray], mismatch: Mismatch) -> Source:
    """The source with the pairs' two sides cut down to those members, in the old order."""
    splits = {
        f"train/{domain}": [item for item, inside in zip(source.splits[f"train/{domain}"], mask, strict=True) if inside]
        for domain, mask in members.items()
    }
    parameters = source.parameters | {"mismatch": "k-means", "seed": mismatch.seed}
    if mismatch.add_opposite:
        parameters["add_opposite"] = mismatch.add_opposite
    return dataclasses.replace(source, splits=source.splits | splits, parameters=parameters)
