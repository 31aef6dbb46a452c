"""The loader of a job: crops a second from its data root, beside other loaders, or with an empty and a filled shard cache.

Measurements, by their keys in the JSON (rates count images, two a pair):

loader             images/s of `Loader`, from when it has started
first_batch        s from making the loader to its first batch
of a root on a disk, of JPEG images; `launch.benchmarks.other_loaders` says what these are:
bare_dali          images/s of one DALI pipeline, threads and calls alike, and nothing else
pillow_dataloader  images/s of Pillow in a torch DataLoader with as many processes
loader_to_bare_dali, loader_to_pillow_dataloader    ratio loader / other
of a root on S3, where the loader is timed from its making on:
empty_cache        images/s with an empty shard cache; first_batch is of this
loader             images/s once more, with the cache that this left
empty_to_filled    ratio empty_cache / loader
"""

import dataclasses
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from infra.errors import UserError
from launch.benchmarks.measuring import Measurement, interleaved, ratios
from launch.benchmarks.other_loaders import bare_dali, pillow_dataloader
from launch.runs.config import JobConfig
from launch.runs.data import find_data
from pipelines.loader import Loader
from trainer.engines import make_engine

HELP = "the loader of a job: images a second against bare DALI and a torch DataLoader, or with an empty cache"
WARM_UP = 16  # steps, more than any of the loaders works ahead


def run(config: JobConfig, repetitions: int, steps: int | None) -> list[Measurement]:
    """Measure `steps` steps in each repetition, 500 unless told. UserError for images that the other loaders do not read."""
    root, count = find_data(config.task, config.data.root), steps or 500
    device = make_engine(config.engine).device
    measure = from_store if "://" in root else from_disk
    with tempfile.TemporaryDirectory(prefix="bench-data-") as work:
        return measure(config, root, device, count, repetitions, Path(work))


def from_disk(
    config: JobConfig, root: str, device: torch.device, steps: int, repetitions: int, work: Path
) -> list[Measurement]:
    """Every repetition starts its loader anew and leaves the first steps out."""
    crop, pairs, threads = config.data.crop, config.optim.global_batch, config.data.threads
    shards = sorted(Path(root).glob("train/*/*.tar"))
    for shard in shards:
        with tarfile.open(shard) as tar:
            tar.extractall(work / shard.parent.name, filter="data")
    if crop is None or not all(list((work / domain).glob("*.jpg")) for domain in ("source", "target")):
        raise UserError("the other loaders read crops of JPEG images: give --crop, and data prepared with --format jpg")
    with closing(_loader(config, root, device)) as loader:
        call_images = loader.steps_per_call * 2 * pairs
    bare = bare_dali(shards, crop, threads, 2 * pairs, call_images, device)

    def ours() -> dict[str, float]:
        begin = time.perf_counter()
        with closing(_loader(config, root, device)) as loader:
            batches = iter(loader)
            next(batches)
            return {"first_batch": time.perf_counter() - begin, **rate("loader", lambda: batches)}

    def rate(name: str, start: Callable[[], Iterator[Any]]) -> dict[str, float]:
        batches = start()
        _take(batches, WARM_UP)
        begin = time.perf_counter()
        _take(batches, steps)
        return {name: 2 * pairs * steps / (time.perf_counter() - begin)}

    def pillow() -> Iterator[Any]:
        return pillow_dataloader(work, crop, threads, pairs, WARM_UP + steps, device)

    others = {"bare_dali": lambda: bare, "pillow_dataloader": pillow}
    found = interleaved([ours, *(partial(rate, name, start) for name, start in others.items())], repetitions)
    return [
        Measurement("loader", "images/s", found["loader"]),
        Measurement("first_batch", "s", found["first_batch"]),
        *(Measurement(name, "images/s", found[name]) for name in others),
        *(Measurement(f"loader_to_{name}", "", ratios(found["loader"], found[name])) for name in others),
    ]


def from_store(
    config: JobConfig, root: str, device: torch.device, steps: int, repetitions: int, work: Path
) -> list[Measurement]:
    """Each repetition has a shard cache of its own, which the first of two loaders fills."""

    def twice() -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=work) as cache:
            cached = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=cache))
            (first, empty), (_, filled) = timed(cached), timed(cached)
        return {"first_batch": first, "empty_cache": empty, "loader": filled}

    def timed(cached: JobConfig) -> tuple[float, float]:
        """Seconds to the first batch, images a second of all."""
        begin = time.perf_counter()
        with closing(_loader(cached, root, device)) as loader:
            batches = iter(loader)
            _take(batches, 1)
            first = time.perf_counter() - begin
            _take(batches, steps - 1)
            return first, 2 * config.optim.global_batch * steps / (time.perf_counter() - begin)

    found = interleaved([twice], repetitions)
    return [
        Measurement("loader", "images/s", found["loader"]),
        Measurement("empty_cache", "images/s", found["empty_cache"]),
        Measurement("first_batch", "s", found["first_batch"]),
        Measurement("empty_to_filled", "", ratios(found["empty_cache"], found["loader"])),
    ]


def _loader(config: JobConfig, root: str, device: torch.device) -> Loader:
    return Loader(root, config.data, seed=config.seed, global_batch=config.optim.global_batch, device=device)


def _take(batches: Iterator[Any], steps: int) -> None:
    """Take so many batches, until the last one is complete."""
    for _ in islice(batches, steps):
        pass
    if torch.cuda.is_available():
        torch.cuda.synchronize()
