"""A set-up without data: street scenes drawn here, and a segmenter trained on them to evaluate translations with.

The demo, a search without data and the flipping benchmark have one each. Both parts are kept for the next time.
`python -m launch.runs.embedded` makes those of the demo.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.console import setup_logging
from infra.errors import exits_cleanly
from infra.storage import open_storage
from launch.runs.segmenter import make_config, train
from pipelines.prepare import Encoding, prepare
from pipelines.sources.base import Source
from pipelines.sources.drawn import SOURCE_LAYOUT, mismatched, street_scenes

FAIR = 0.5  # mismatch of the segmenter's scenes: as full of sky as of trees
SMALL_SEGMENTER = {"model.output_stride": 8, "model.width": 0.5, "engine.precision": "fp32"}  # for two CPU cores
LARGE_SEGMENTER = {"model.output_stride": 8}

QUIET = {"loop.keep_logged": 0, "loop.checkpoint_every": 500}
# Of a segmenter that guides a translator: it is to see through a change of look, and of how much there is of what, and not to be
# fooled.
GUIDE = {"jitter": 1.0, "class_weights": 0.5, "model.members": 3}
OWN_SEED = 1000  # of what belongs to no seed of a comparison

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """config: options of the translators. scenes: (width, height). counts: training scenes of each domain for the translators,
    and for the segmenter; test scenes. segmenter: options of its training. of_sources: those that a segmenter of the sources
    has otherwise."""

    config: Path
    scenes: tuple[int, int]
    counts: tuple[int, int, int]
    segmenter: Mapping[str, Any]
    of_sources: Mapping[str, Any] = field(default_factory=dict)

    def draw(self, root: Path, mismatch: float) -> Path:
        """The data root of translators, drawn if it is not there yet. mismatch: of its targets, from 0 to 1."""
        return self._draw(root, self.counts[0], mismatch, seed=0)

    def train_segmenter(self, root: Path, run_dir: Path) -> Path:
        """Its run folder, trained, on scenes of its own in `root`, if it is not yet."""
        self._draw(root, self.counts[1], FAIR, seed=1)
        return train(make_config(QUIET, self.segmenter, {"data.root": str(root), "run_dir": str(run_dir)}))

    def train_source_segmenter(self, root: str, run_dir: Path) -> Path:
        """The run folder of a segmenter of a data root's sources, in whatever look, trained if it is not yet: it matches crops
        and keeps the classes of translations, which the other one then judges."""
        given = {"domain": "source", "data.root": root, "run_dir": str(run_dir), "seed": OWN_SEED}
        return train(make_config(QUIET, self.segmenter, GUIDE, self.of_sources, given))

    def draw_tests(self, root: Path, count: int, mismatch: float) -> Path:
        """A data root whose test images have what such targets have, in their look, and were never trained on."""
        layout = mismatched(mismatch)
        return self._prepare(root, street_scenes(1, count, OWN_SEED, layout, layout))

    def _draw(self, root: Path, count: int, mismatch: float, seed: int) -> Path:
        return self._prepare(root, street_scenes(count, self.counts[2], seed, SOURCE_LAYOUT, mismatched(mismatch)))

    def _prepare(self, root: Path, source: Source) -> Path:
        log.info("street scenes: %s", root)
        prepare(source, open_storage(str(root)), Encoding(self.scenes), os.cpu_count() or 1, progress=False)
        return root


DEMO = Setup(
    Path(__file__).parents[1] / "demo.yaml", (192, 96), (400, 800, 40), {**SMALL_SEGMENTER, "optim.epochs": 4.0}
)


@exits_cleanly
def main() -> None:
    setup_logging(None)
    DEMO.train_segmenter(Path("data/demo-segmenter"), Path("runs/demo-segmenter"))
    DEMO.draw(Path("data/demo"), mismatch=1.0)


if __name__ == "__main__":
    main()
