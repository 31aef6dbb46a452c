"""What the flipping benchmark trains on: street scenes at three strengths of mismatch, or a data root of the user's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from infra.errors import UserError
from infra.storage import open_storage
from launch.flipping_results import STRENGTHS
from launch.runs.embedded import Setup
from pipelines.manifest import Manifest, load_manifest
from trainer.segmentation import check_label_space, load_segmenter


class BenchmarkData(Protocol):
    """names: of what there is to train on, which results call the mismatch. judge: the run of the segmenter that evaluates."""

    task: str
    names: Sequence[str]
    judge: Path

    def root(self, name: str) -> Path:
        """The data root of that name."""
        ...

    def prepare(self, names: Sequence[str]) -> None:
        """Make these roots and the judge, where they are missing. UserError for data that cannot do."""
        ...

    @property
    def training_images(self) -> int:
        """Sources of an epoch, in every root."""
        ...

    def sources(self) -> Path:
        """A root whose sources those of every root are, prepared: what S is trained on."""
        ...


class StreetScenes:
    """Drawn in `out`; the strength of the mismatch is in the layout of the training targets alone."""

    task = "gta2city"
    names: Sequence[str] = tuple(STRENGTHS)

    def __init__(self, setup: Setup, out: Path) -> None:
        self.setup, self.out, self.judge = setup, out, out / "segmenter"

    def root(self, name: str) -> Path:
        return self.out / "data" / name

    def prepare(self, names: Sequence[str]) -> None:
        for name in names:
            self.setup.draw(self.root(name), STRENGTHS[name])
        self.setup.train_segmenter(self.out / "data" / "segmenter", self.judge)

    @property
    def training_images(self) -> int:
        return self.setup.counts[0]

    def sources(self) -> Path:
        first = self.names[0]
        self.setup.draw(self.root(first), STRENGTHS[first])
        return self.root(first)


class OwnData:
    """One prepared root, whose name is the folder's, with labels of the test sources; and a segmenter that knows its targets."""

    def __init__(self, path: Path, task: str, judge: Path) -> None:
        self.path, self.task, self.judge = path, task, judge
        self.names: Sequence[str] = (path.resolve().name,)

    def root(self, name: str) -> Path:
        return self.path

    def prepare(self, names: Sequence[str]) -> None:
        label_space = self._manifest.split("test", "source").label_space
        if label_space is None:
            raise UserError(f"the test sources of {self.path} have no labels, from which flips are counted: prepare them with "
                            "labels")  # fmt: skip
        check_label_space(load_segmenter(self.judge), label_space)

    @property
    def training_images(self) -> int:
        return self._manifest.split("train", "source").samples

    def sources(self) -> Path:
        return self.path

    @property
    def _manifest(self) -> Manifest:
        return load_manifest(open_storage(str(self.path)))
