"""A search without data: street scenes drawn here, and a segmenter trained on them to judge translations by, at a size
that fits the machine. Both are kept for the next search."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.config import read_yaml
from infra.storage import open_storage
from launch.runs.segmenter import make_config, train
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import SOURCE_LAYOUT, mismatched, street_scenes

HERE = Path(__file__).parent
MISMATCH = 0.5  # of the trials' targets
FAIR = 0.5  # of the segmenter's scenes: as full of sky as of trees
SEEDS = {"trials": 0, "segmenter": 1}


@dataclass(frozen=True)
class Size:
    """config: options of the trials. scenes: (width, height). counts: training scenes of each domain for the trials,
    target scenes for the segmenter, test scenes. segmenter: options of its training."""

    config: Path
    scenes: tuple[int, int]
    counts: tuple[int, int, int]
    segmenter: Mapping[str, Any]


SMALL = Size(
    HERE / "small.yaml", (128, 64), (600, 800, 40),
    {"model.output_stride": 8, "model.width": 0.5, "optim.epochs": 6.0, "engine.precision": "fp32"},
)  # fmt: skip
LARGE = Size(HERE / "large.yaml", (256, 128), (2000, 5000, 200), {"model.output_stride": 8})


def options(size: Size) -> dict[str, Any]:
    """What the trials are like, to begin with."""
    return read_yaml(size.config)


def draw(size: Size) -> Path:
    """Where the scenes of the trials are, drawn if they are not there yet."""
    return _draw(size, "trials", size.counts[0], MISMATCH)


def segmenter(size: Size) -> Path:
    """The run folder of the segmenter, trained if it is not yet."""
    root = _draw(size, "segmenter", size.counts[1], FAIR)
    run_dir = Path(f"runs/street-segmenter-{_name(size)}").absolute()
    quiet = {"loop.keep_logged": 0, "loop.checkpoint_every": 500}
    return train(make_config(quiet, size.segmenter, {"data.root": str(root), "run_dir": str(run_dir)}))


def _draw(size: Size, use: str, count: int, mismatch: float) -> Path:
    root = Path(f"data/street-scenes-{_name(size)}-{use}").absolute()
    source = street_scenes(count, size.counts[2], SEEDS[use], SOURCE_LAYOUT, mismatched(mismatch))
    prepare(source, open_storage(str(root)), Encoding(size.scenes), os.cpu_count() or 1, progress=False)
    return root


def _name(size: Size) -> str:
    return "{}x{}".format(*size.scenes)
