"""Two domains with unmatched statistics made of pairs: sources from one cluster of scenes, targets from the other."""

import dataclasses

import numpy as np
from sklearn.cluster import KMeans
from tqdm import tqdm

from infra.errors import UserError
from pipelines.labels import CLASSES, class_histogram
from pipelines.sources.base import Source

COUNTED_SIZE = (256, 128)  # at which labels are counted, in pixels: shares hardly depend on it
VEGETATION = CLASSES.index("vegetation")


def unmatched(source: Source, seed: int = 0, progress: bool = True) -> Source:
    """The training pairs of labelled scenes split in two by K-means, K = 2, on their shares of the 19 classes; the
    sources are those of one cluster, the targets those of the other (SRUNIT, supplement, Appendix C).

    The paper does not say which is which: here the sources' cluster is the one with less vegetation. Test images stay as
    they are. seed: of K-means' beginnings. Reads every training label. UserError for unlabelled or too few scenes.
    """
    sources, targets = source.splits["train/source"], source.splits["train/target"]
    assert len(sources) == len(targets)
    if len(sources) < 2:
        raise UserError("a single training pair cannot be split in two: leave out --mismatch")
    shares = []
    for item in tqdm(sources, "clustering", unit="label", disable=not progress):
        label = item.load(COUNTED_SIZE)[1]
        if label is None:
            raise UserError(f"{item.name} has no label to cluster by: leave out --mismatch")
        histogram = class_histogram(label)
        shares.append(histogram / max(1, histogram.sum()))
    found = KMeans(2, n_init=10, random_state=seed).fit(np.array(shares))
    first = int(np.argmin(found.cluster_centers_[:, VEGETATION]))
    is_source = found.labels_ == first
    splits = source.splits | {
        "train/source": [item for item, inside in zip(sources, is_source, strict=True) if inside],
        "train/target": [item for item, inside in zip(targets, is_source, strict=True) if not inside],
    }
    return dataclasses.replace(
        source, splits=splits, parameters=source.parameters | {"mismatch": "k-means", "seed": seed}
    )
