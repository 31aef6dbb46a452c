"""Random access to whole images and their labels, for evaluation and sample grids."""

import bisect
import io
import itertools
from pathlib import Path

import numpy as np

from infra.errors import UserError
from infra.images import DAMAGED, STORED, open_image
from infra.storage import open_storage
from pipelines.cache import OpenShard, ShardCache
from pipelines.manifest import SampleEntry, load_manifest


class ImageDataset:
    """The images of one domain of one split, in the order of the shards.

    split: "train" or "test". domain: "source" or "target". fallback: the split to take where the first has no images.
    cache_dir: where shards from S3 are kept, the usual place if None. Raises UserError if there is no such data.
    """

    def __init__(
        self, root_url: str, split: str, domain: str, *, fallback: str | None = None, cache_dir: str | None = None
    ) -> None:
        storage = open_storage(root_url)
        manifest = load_manifest(storage)
        first_choice = manifest.splits.get(f"{split}/{domain}")
        has_images = first_choice is not None and first_choice.samples > 0
        self.split = manifest.split(split if has_images or fallback is None else fallback, domain)
        self._cache = ShardCache(storage, Path(cache_dir) if cache_dir else None)
        self._ends = list(itertools.accumulate(shard.samples for shard in self.split.shards))

    def __len__(self) -> int:
        return self.split.samples

    @property
    def keys(self) -> list[str]:
        """The names of all samples; fetches every shard."""
        return [entry.key for shard in self.split.shards for entry in self._cache.open(shard).entries]

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(image, label) of sample i in [0, len): uint8 RGB (H, W, 3); uint8 (H, W) trainIds, or None if unlabelled.

        UserError names a sample that cannot be decoded.
        """
        shard, entry = self._find(i)
        try:
            image = np.asarray(open_image(io.BytesIO(shard.read(entry.image)), STORED).convert("RGB"))
            label = np.asarray(open_image(io.BytesIO(shard.read(entry.label)), STORED)) if entry.label else None
        except DAMAGED as error:
            raise UserError(
                f"{entry.key} in {shard.path} cannot be decoded ({error}): prepare the data again without it"
            ) from None
        return image, label

    def _find(self, i: int) -> tuple[OpenShard, SampleEntry]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        number = bisect.bisect_right(self._ends, i)
        shard = self.split.shards[number]
        opened = self._cache.open(shard)
        return opened, opened.entries[i - (self._ends[number] - shard.samples)]
