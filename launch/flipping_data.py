"""What the flipping benchmark trains on: street scenes at three strengths of mismatch, or a data root of the user's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from infra.storage import open_storage
from launch.flipping_results import STRENGTHS
from launch.runs.embedded import Setup
from launch.runs.evaluation import load_judge
from pipelines.manifest import Manifest, load_manifest


def name_of(root: str) -> str:
    """What a data root of the user's, here or in S3, is called."""
    return Path(root).resolve().name


class BenchmarkData(Protocol):
    """names: of what there is to train on, which results call the mismatch. judge: the run of the segmenter that evaluates."""

    task: str
    names: Sequence[str]
    judge: Path

    def root(self, name: str) -> str:
        """The data root of that name."""
        ...

    def check(self) -> None:
        """UserError for data that cannot do, before anything is made."""
        ...

    def prepare(self, names: Sequence[str]) -> None:
        """Make these roots and the judge, where they are missing."""
        ...

    @property
    def training_images(self) -> int:
        """Sources of an epoch, in every root."""
        ...

    def sources(self) -> str:
        """A root whose sources those of every root are, prepared: what S is trained on."""
        ...


class StreetScenes:
    """Drawn in `out`; the strength of the mismatch is in the layout of the training targets alone."""

    task = "gta2city"
    names: Sequence[str] = tuple(STRENGTHS)

    def __init__(self, setup: Setup, out: Path) -> None:
        self.setup, self.out, self.judge = setup, out, out / "segmenter"

    def root(self, name: str) -> str:
        return str(self.out / "data" / name)

    def check(self) -> None:
        pass

    def prepare(self, names: Sequence[str]) -> None:
        for name in names:
            self._draw(name)
        self.setup.train_segmenter(self.out / "data" / "segmenter", self.judge)

    @property
    def training_images(self) -> int:
        return self.setup.counts[0]

    def sources(self) -> str:
        return self._draw(self.names[0])

    def _draw(self, name: str) -> str:
        self.setup.draw(Path(self.root(name)), STRENGTHS[name])
        return self.root(name)


class OwnData:
    """One prepared root, whose name is the folder's, with labels of the test sources; and a segmenter that knows its targets."""

    def __init__(self, path: str, task: str, judge: Path) -> None:
        self.path, self.task, self.judge = path, task, judge
        self.names: Sequence[str] = (name_of(path),)

    def root(self, name: str) -> str:
        return self.path

    def check(self) -> None:
        load_judge(self.judge, self.path, self._manifest.split("test", "source"))

    def prepare(self, names: Sequence[str]) -> None:
        pass

    @property
    def training_images(self) -> int:
        return self._manifest.split("train", "source").samples

    def sources(self) -> str:
        return self.path

    @property
    def _manifest(self) -> Manifest:
        return load_manifest(open_storage(self.path))
