"""What a search without data has instead, at a size that fits the machine."""

from pathlib import Path
from typing import Any

from infra.config import read_yaml
from launch.runs.embedded import LARGE_SEGMENTER, SMALL_SEGMENTER, Setup

HERE = Path(__file__).parent
MISMATCH = 0.5  # of the trials' targets

SMALL = Setup(HERE / "small.yaml", (128, 64), (600, 800, 40), {**SMALL_SEGMENTER, "optim.epochs": 6.0})
LARGE = Setup(HERE / "large.yaml", (256, 128), (2000, 5000, 200), LARGE_SEGMENTER)


def options(setup: Setup) -> dict[str, Any]:
    """What the trials are like, to begin with."""
    return read_yaml(setup.config)


def draw(setup: Setup) -> Path:
    """Where the scenes of the trials are."""
    return setup.draw(Path(f"data/street-scenes-{_name(setup)}-trials").absolute(), MISMATCH)


def segmenter(setup: Setup) -> Path:
    """The run folder of the segmenter."""
    root = Path(f"data/street-scenes-{_name(setup)}-segmenter").absolute()
    return setup.train_segmenter(root, Path(f"runs/street-segmenter-{_name(setup)}").absolute())


def _name(setup: Setup) -> str:
    return "{}x{}".format(*setup.scenes)
