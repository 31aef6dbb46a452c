"""Decoding a job's JPEG images by DALI alone, with shares of them for a GPU's hardware decoder (on a CPU there is none).

Measurements, by their keys in the JSON:

images/SHARE    crops a second of one DALI pipeline that leaves this share of a batch to the hardware decoder
"""

import time
from itertools import islice
from pathlib import Path

import torch

from infra.errors import UserError
from launch.benchmarks.measuring import Measurement, interleaved
from launch.benchmarks.other_loaders import bare_dali
from launch.runs.config import JobConfig
from launch.runs.data import find_data
from trainer.engines import make_engine

HELP = "DALI's decoding of a job's images, with shares of them for a GPU's hardware decoder"
SHARES = (0.0, 0.5, 0.75)
CALL = 64  # images


def run(config: JobConfig, repetitions: int, steps: int | None) -> list[Measurement]:
    """Measure `steps` calls of 64 images in each repetition, 50 unless told."""
    device = make_engine(config.engine).device
    shards = sorted(Path(find_data(config.task, config.data.root)).glob("train/*/*.tar"))
    if config.data.crop is None or not shards:
        raise UserError(
            "decoding is measured of crops of JPEG images in shards on a disk: give --crop, and such --data"
        )
    count, crop, threads = steps or 50, config.data.crop, config.data.threads

    def rate(share: float) -> dict[str, float]:
        batches = bare_dali(shards, crop, threads, CALL, CALL, device, hardware=share)
        list(islice(batches, 4))
        begin = time.perf_counter()
        list(islice(batches, count))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return {f"images/{share}": count * CALL / (time.perf_counter() - begin)}

    shares = SHARES if device.type == "cuda" else SHARES[:1]
    found = interleaved([lambda share=share: rate(share) for share in shares], repetitions)  # type: ignore[misc]
    return [Measurement(name, "images/s", values) for name, values in found.items()]
