"""The options of the data."""

from dataclasses import dataclass

from infra.config import option
from infra.disk import is_in_store
from infra.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and how they are cut."""

    # Resumable: the same data may lie elsewhere. That it is the same, its manifest tells.
    root: str | None = option(None, "prepared data: a folder or s3://bucket/prefix", flag="--data", resumable=True)
    crop: int | None = option(256, "side of the random square crop in pixels; none: the whole image", flag="--crop")
    flip: bool = option(True, "mirror half of the crops left to right")
    match: str | None = option(
        None,
        "show each source crop a target crop like it: the name of a match that launch/prepare.py match made, or none",
    )
    window: int = option(8, "shards whose samples are shuffled together")
    decoder: str = option("auto", "image decoder; auto is DALI where installed", choices=("auto", "dali", "pillow"))
    threads: int = option(4, "decoding threads per rank", resumable=True)
    prefetch: int = option(4, "training steps decoded ahead", resumable=True)
    cache_dir: str | None = option(None, "shards from S3 are kept here [~/.cache/srunit/shards]", resumable=True)
    cache_gb: float | None = option(
        None, "limit of that cache in GB of 10^9 bytes: the least recently used shards go [no limit]", resumable=True
    )
    on_bad_sample: str = option(
        "fail", "an image that cannot be decoded or cropped: stop with its name, or train on another in its place",
        flag="--on-bad-sample", choices=("fail", "skip"), resumable=True,
    )  # fmt: skip
    on_bad_shard: str = option(
        "fail", "a shard that is missing or damaged: stop with its name, or train on others in its place",
        flag="--on-bad-shard", choices=("fail", "skip"), resumable=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("crop", "window", "threads", "prefetch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--data.{name} is {value}: give at least 1")
        if self.cache_dir and is_in_store(self.cache_dir):
            raise UserError(f"--data.cache-dir {self.cache_dir} is a place in a store: name a folder of this machine")
        if self.cache_gb is not None and self.cache_gb <= 0:
            raise UserError(f"--data.cache-gb is {self.cache_gb:g}: give more than 0, or leave it out for no limit")
