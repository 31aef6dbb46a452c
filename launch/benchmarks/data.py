"""The data plane: the loader from cached shards and from S3, preparation, memory and start-up; each against a rival.

Figures, by their keys in the JSON (ratios are of neighbouring repetitions; rates count images, two a pair):

loader, bare_dali, pillow_dataloader    images/s from shards on the disk: `Loader`; one DALI pipeline, threads and
                                        calls alike; Pillow in a torch DataLoader with as many processes
loader_to_bare_dali                     ratio, target at least 0.9
loader_to_pillow_dataloader             ratio, target at least 3
s3_cold, s3_cached                      images/s over a whole epoch from a local S3 server, from making the loader on:
                                        with an empty shard cache; with the cache that this left
s3_cold_to_cached                       ratio, target at least 0.75
s3_first_batch                          s until the first batch of the cold epoch
prepare, plain_pillow                   images/s of launch/prepare.py, whole command; of launch/benchmarks/plain_pillow.py
prepare_to_plain_pillow                 ratio, target at least 0.8
peak_small, peak_large                  10^6 bytes of the loader's process after 50 steps, with 1,000 samples a domain;
                                        with --samples a domain
peak_growth                             the difference, target at most 100
first_batch_small, first_batch_large    s from making the loader to its first batch, imports left out; target of the
                                        large one at most 3
"""

import argparse
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from infra.errors import UserError
from launch.benchmarks import first_batch, plain_pillow
from launch.benchmarks.data_material import (
    PHOTO_SIZE,
    QUALITY,
    Material,
    make_material,
    prepare_photos,
    repeat_photos,
    run_quietly,
    write_large_root,
)
from launch.benchmarks.local_s3 import local_s3
from launch.benchmarks.measuring import Figure, Target, cores, interleaved, pick_device, ratios
from launch.benchmarks.other_loaders import bare_dali, pillow_dataloader
from pipelines.config import DataConfig
from pipelines.loader import Loader
from pipelines.prepare import STREET_SIZE

HELP = "the loader against bare DALI and a torch DataLoader, from disk and S3; preparation; memory and start-up"
CROP = 256
WARM_UP = 16  # steps, more than any of the loaders works ahead
SMALL = 1000  # samples a domain
MEMORY_STEPS = 50

log = logging.getLogger(__name__)


def add_options(command: argparse.ArgumentParser) -> None:
    option = command.add_argument
    option("--only", nargs="+", choices=MEASURES, default=list(MEASURES), help="parts to measure [all]")
    option("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where images are decoded [%(default)s]")
    option("--batch", type=int, default=8, metavar="N", help="pairs of a step [%(default)s]")
    option("--epoch", type=int, default=4096, metavar="N", help="pairs of a repetition [%(default)s]")
    option("--scenes", type=int, default=192, metavar="N", help="scenes drawn for each domain [%(default)s]")
    option(
        "--samples", type=int, default=1_000_000, metavar="N", help="of each domain of the large data set [%(default)s]"
    )
    option("--photos", type=int, default=1500, metavar="N", help="images prepared for each domain [%(default)s]")
    option("--threads", type=int, default=cores(), metavar="N", help="threads, processes and workers [%(default)s]")


def run(args: argparse.Namespace) -> list[Figure]:
    """Measure the parts named. UserError for sizes that cannot work and for parts that need what is not there."""
    for name in ("batch", "scenes", "photos", "samples", "threads"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}: give at least 1")
    if args.epoch < args.batch:
        raise UserError(
            f"--epoch {args.epoch} is less than one batch: give at least {args.batch}, or a smaller --batch"
        )
    with tempfile.TemporaryDirectory(prefix="bench-data-") as work:
        log.info("drawing %d scenes", 2 * args.scenes)
        material = make_material(Path(work), args.scenes, args.epoch, args.threads)
        figures = []
        for name in args.only:
            log.info("measuring %s", name)
            figures += MEASURES[name](material, args)
        return figures


def from_cache(material: Material, args: argparse.Namespace) -> list[Figure]:
    """Rates over shards on the disk. Every repetition starts its loader anew and leaves the first steps out."""
    device = pick_device(args.device)
    steps = args.epoch // args.batch
    shards = sorted(material.root.rglob("*.tar"))
    loader = _loader(str(material.root), args)
    images = 2 * args.batch
    bare = bare_dali(shards, CROP, args.threads, images, loader.steps_per_call * images, device)

    def rate(name: str, start: Callable[[], Iterator[Any]]) -> dict[str, float]:
        batches = start()
        _run(batches, WARM_UP)
        begin = time.perf_counter()
        _run(batches, steps)
        return {name: 2 * args.batch * steps / (time.perf_counter() - begin)}

    def start_pillow() -> Iterator[Any]:
        return pillow_dataloader(material.folder, CROP, args.threads, args.batch, WARM_UP + steps, device)

    rates = interleaved(
        [
            partial(rate, "loader", lambda: iter(loader)),
            partial(rate, "bare_dali", lambda: bare),
            partial(rate, "pillow_dataloader", start_pillow),
        ],
        args.repetitions,
    )
    loader.close()
    to_bare = ratios(rates["loader"], rates["bare_dali"])
    to_pillow = ratios(rates["loader"], rates["pillow_dataloader"])
    return [
        Figure("loader", "loader, cached shards", "images/s", rates["loader"]),
        Figure("bare_dali", "  a bare DALI pipeline", "images/s", rates["bare_dali"]),
        Figure("pillow_dataloader", "  Pillow in a torch DataLoader", "images/s", rates["pillow_dataloader"]),
        Figure("loader_to_bare_dali", "  loader / bare DALI", "", to_bare, Target("at least", 0.9)),
        Figure("loader_to_pillow_dataloader", "  loader / DataLoader", "", to_pillow, Target("at least", 3)),
    ]


def from_s3(material: Material, args: argparse.Namespace) -> list[Figure]:
    """Rates over one epoch from a local S3 server, with an empty shard cache and with the cache this leaves."""
    steps = args.epoch // args.batch
    cache = material.work / "cache"

    def epoch() -> tuple[float, float]:
        """(images/s of a whole epoch, seconds to its first batch)."""
        begin = time.perf_counter()
        loader = _loader(material.url, args, cache)
        batches = iter(loader)
        _run(batches, 1)
        first = time.perf_counter() - begin
        _run(batches, steps - 1)
        rate = 2 * args.batch * steps / (time.perf_counter() - begin)
        loader.close()
        return rate, first

    def cold() -> dict[str, float]:
        shutil.rmtree(cache, ignore_errors=True)
        rate, first = epoch()
        return {"s3_cold": rate, "s3_first_batch": first}

    def cached() -> dict[str, float]:
        return {"s3_cached": epoch()[0]}

    with local_s3(material.s3):
        found = interleaved([cold, cached], args.repetitions)
    to_cached = ratios(found["s3_cold"], found["s3_cached"])
    return [
        Figure("s3_cold", "loader, local S3 server, empty cache", "images/s", found["s3_cold"]),
        Figure("s3_cached", "  the same again, from the cache", "images/s", found["s3_cached"]),
        Figure("s3_cold_to_cached", "  empty cache / cached", "", to_cached, Target("at least", 0.75)),
        Figure("s3_first_batch", "  first batch, empty cache", "s", found["s3_first_batch"]),
    ]


def preparation(material: Material, args: argparse.Namespace) -> list[Figure]:
    """Rates of two whole commands over the same JPEG files, each in processes of its own."""
    out = material.work / "out"
    photos = material.work / "many"
    repeat_photos(material.photos, photos, args.photos)

    def rate(name: str, command: Callable[[], Any]) -> dict[str, float]:
        begin = time.perf_counter()
        command()
        seconds = time.perf_counter() - begin
        shutil.rmtree(out)
        return {name: 2 * args.photos / seconds}

    def plain() -> None:
        size = [str(side) for side in STREET_SIZE]
        run_quietly("-m", plain_pillow.__name__, str(photos), str(out), *size, str(QUALITY), str(args.threads))

    found = interleaved(
        [
            partial(rate, "prepare", lambda: prepare_photos(photos, out, args.threads)),
            partial(rate, "plain_pillow", plain),
        ],
        args.repetitions,
    )
    to_plain = ratios(found["prepare"], found["plain_pillow"])
    return [
        Figure("prepare", "launch/prepare.py, {}x{} JPEG".format(*PHOTO_SIZE), "images/s", found["prepare"]),
        Figure("plain_pillow", "  plain Pillow on all cores", "images/s", found["plain_pillow"]),
        Figure("prepare_to_plain_pillow", "  preparation / plain Pillow", "", to_plain, Target("at least", 0.8)),
    ]


def memory_and_start(material: Material, args: argparse.Namespace) -> list[Figure]:
    """Peak memory and time to the first batch of the loader alone, with few and with very many samples."""
    roots = {"small": material.work / "small", "large": material.work / "large"}
    write_large_root(roots["small"], material.folder, SMALL)
    write_large_root(roots["large"], material.folder, args.samples)

    def measure(size: str) -> dict[str, float]:
        options = (args.batch, args.threads, MEMORY_STEPS)
        found = json.loads(run_quietly("-m", first_batch.__name__, str(roots[size]), *map(str, options)))
        return {f"peak_{size}": found["peak_MB"], f"first_batch_{size}": found["first_batch_s"]}

    found = interleaved([partial(measure, size) for size in roots], args.repetitions)
    growth = tuple(large - small for small, large in zip(found["peak_small"], found["peak_large"], strict=True))
    large = f"{args.samples:,} samples"
    return [
        Figure("peak_small", f"peak memory of the loader, {SMALL:,} samples", "MB", found["peak_small"]),
        Figure("peak_large", f"  {large}", "MB", found["peak_large"]),
        Figure("peak_growth", "  growth", "MB", growth, Target("at most", 100)),
        Figure("first_batch_small", f"first batch, {SMALL:,} samples", "s", found["first_batch_small"]),
        Figure("first_batch_large", f"  {large}", "s", found["first_batch_large"], Target("at most", 3)),
    ]


def _loader(root: str, args: argparse.Namespace, cache: Path | None = None) -> Loader:
    config = DataConfig(crop=CROP, threads=args.threads, decoder="dali", cache_dir=str(cache) if cache else None)
    return Loader(root, config, seed=0, global_batch=args.batch, device=pick_device(args.device))


def _run(batches: Iterator[Any], steps: int) -> None:
    """Take so many batches, until the last one is complete."""
    for _ in islice(batches, steps):
        pass
    if torch.cuda.is_available():
        torch.cuda.synchronize()


MEASURES: dict[str, Callable[[Material, argparse.Namespace], list[Figure]]] = {
    "cache": from_cache,
    "s3": from_s3,
    "preparation": preparation,
    "memory": memory_and_start,
}
