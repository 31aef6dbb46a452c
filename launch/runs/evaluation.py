"""Evaluation of translators on test images: metrics and pictures, on any number of ranks."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from infra.errors import UserError
from infra.signals import ToldToStop, current
from infra.storage import open_storage
from launch.runs.folder import RunFolder, run_around
from pipelines.dataset import ImageDataset
from pipelines.labels import CLASSES, colourise
from pipelines.manifest import Manifest, Split, load_manifest
from pipelines.matching.match import load_facts
from trainer.engines import Engine
from trainer.evaluation import Example, MetricCollection, compute_metrics, deltas_of
from trainer.evaluation.charts import distribution_chart, flip_chart
from trainer.evaluation.config import EvaluationConfig
from trainer.evaluation.confusion import NONE, ConfusionMatrix
from trainer.evaluation.distribution import class_distributions
from trainer.evaluation.flips import flips
from trainer.evaluation.inception import load_inception
from trainer.evaluation.worst import WorstImages
from trainer.exact import exact_arithmetic
from trainer.samples import stack
from trainer.segmentation import Segmenter, check_label_space, load_segmenter
from trainer.segmentation.load import weights_sha256
from trainer.translator import Translator

SHEET_ROWS = 8
PICTURES = ("evaluation", "flips", "class_distribution", "worst_images")  # the last three need labels and a segmenter
WORST = 8
TEACHER = "method.semantic.segmenter"


@dataclass(frozen=True)
class Outcome:
    """images: how many were translated. metrics: as `compute_metrics` gives them. pictures: uint8 (H, W, 3)
    by name, some of PICTURES; "evaluation" is source | translation | true target. rows: its rows, of images (h, w, 3)."""

    images: int
    metrics: dict[str, Any]
    pictures: dict[str, np.ndarray]
    rows: tuple[tuple[np.ndarray, ...], ...] = ()

    def beside(self, others: Sequence["Outcome"]) -> "Outcome":
        """With the translations of other outcomes on the same images beside its own, in "evaluation"."""
        rows = tuple(
            (source, translation, *(other.rows[k][1] for other in others), *truth)
            for k, (source, translation, *truth) in enumerate(self.rows)
        )
        return dataclasses.replace(self, rows=rows, pictures={**self.pictures, "evaluation": _sheet(rows)})


def _sheet(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    return stack([stack(row, axis=1) for row in rows], axis=0)


def _run_of(path: str) -> Path:
    """The folder of a run, also of one of its checkpoints."""
    place = Path(path).resolve()
    return run_around(place).path if place.parent.name == RunFolder(place).checkpoints.name else place


def load_judge(path: Path, root: str, split: Split, device: torch.device | str = "cpu") -> Segmenter:
    """The segmenter that is to judge translations of the test sources of a data root. split: these. UserError for one that is
    none (`load_segmenter`), and unless they have labels of its kind."""
    if split.label_space is None:
        raise UserError(f"the test sources of {root} have no labels to compare a segmenter's with: "
                        "leave out the segmenter, or prepare the data with labels")  # fmt: skip
    segmenter = load_segmenter(path, device)
    check_label_space(segmenter, split.label_space)
    return segmenter


def weights_of(segmenter: Path) -> str:
    """The hash of a segmenter's weights. Errors: `load_segmenter`."""
    return weights_sha256(load_segmenter(segmenter))


def check_judged_by(folder: RunFolder, judge: Path) -> None:
    """UserError if a run was evaluated by another segmenter than this one, which its options leave free. One that is gone may be
    this one, moved."""
    before = Path(folder.saved().get("evaluation.segmenter") or judge)
    if before.resolve() == judge.resolve() or not before.exists():
        return
    if weights_of(before) != weights_of(judge):
        raise UserError(f"{folder.path} was judged by {before}, not {judge}: name another --out")


def _matched_by(config: Mapping[str, Any], root: str) -> str | None:
    """The hash of the segmenter that a training's target crops were matched by, where they were and the match is still there: on
    its data, or those that it is evaluated on."""
    for place in (config.get("data.root"), root):
        if config.get("data.match") and place:
            with suppress(UserError):
                return load_facts(open_storage(place), config["data.match"]).segmenter
    return None


class TestImages:
    """`limit` test images of each domain (all if None), evenly spread over the split.

    UserError if there are none, or if the pairs do not fit together.
    """

    def __init__(self, root: str, limit: int | None, cache_dir: str | None) -> None:
        self.manifest: Manifest = load_manifest(open_storage(root))
        self.paired = self.manifest.paired
        self.sources = ImageDataset(root, "test", "source", cache_dir=cache_dir)
        has_targets = "test/target" in self.manifest.splits and self.manifest.splits["test/target"].samples > 0
        self.targets = ImageDataset(root, "test", "target", cache_dir=cache_dir) if has_targets else None
        if self.paired and (self.targets is None or _shape(self.targets) != _shape(self.sources)):
            raise UserError(f"the test pairs of {root} differ in number or size between source and target: "
                            "prepare the data again")  # fmt: skip
        self.source_places = _spread(len(self.sources), limit)
        self.target_places = _spread(len(self.targets), limit) if self.targets else []

    def source(self, place: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """(image, its true translation, its label) of a test source; None for what the data lacks."""
        image, label = self.sources.read(place)
        return image, self.targets.read(place)[0] if self.paired and self.targets else None, label

    def target(self, place: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(image, label) of a test target."""
        assert self.targets is not None
        return self.targets.read(place)


def _shape(samples: ImageDataset) -> tuple[int, tuple[int, int]]:
    return len(samples), samples.split.image_size


def _spread(length: int, limit: int | None) -> list[int]:
    count = min(limit or length, length)
    return [k * length // count for k in range(count)]


def _how_wrong(place: int, label: np.ndarray, predicted: np.ndarray) -> tuple[float, str]:
    """(share of the pixels seen right, a caption that also names the pair of classes confused most)."""
    confusion = ConfusionMatrix(CLASSES)
    confusion.update(label, predicted)
    counts = confusion.counts
    labelled = counts.sum()
    if not labelled:
        return 1.0, f"image {place}: no labelled pixel"
    right = counts.diagonal().sum() / labelled
    caption = f"image {place}: {right:.0%} of the pixels right"
    np.fill_diagonal(counts, 0)
    true, taken_for = np.unravel_index(counts.argmax(), counts.shape)
    if counts.any():
        share = counts[true, taken_for] / labelled
        caption += f"; {CLASSES[true]} → {(*CLASSES, NONE)[taken_for]} {share:.0%} of all pixels"
    return float(right), caption


@dataclass
class _Part:
    """What one rank has counted and kept of the translations."""

    metrics: MetricCollection
    worst: WorstImages = field(default_factory=lambda: WorstImages(WORST, colourise(np.arange(256, dtype=np.uint8))))
    rows: dict[int, list[np.ndarray]] = field(default_factory=dict)  # of the sheet, by place

    def merge(self, other: "_Part") -> None:
        self.metrics.merge(other.metrics)
        self.worst.merge(other.worst)
        self.rows |= other.rows


class Evaluator:
    """Evaluates translators on the test images of a data root.

    The ranks of `engine` share the images; all must call it at once. What does not depend on the translator (the
    untranslated sources, the real target images) is counted once and kept.

    progress: show bars. UserError, when made, for weights, networks and data that do not exist or do not fit together.
    """

    def __init__(
        self,
        root: str,
        task: str,
        engine: Engine,
        config: EvaluationConfig,
        cache_dir: str | None = None,
        *,
        progress: bool = True,
    ) -> None:
        self.images = TestImages(root, config.images, cache_dir)
        self.root, self.engine, self.config = root, engine, config
        self.progress = progress and engine.rank == 0
        judge, weights, sources = config.segmenter, config.inception, self.images.sources.split
        self.segmenter = load_judge(Path(judge), root, sources, engine.device) if judge else None
        self.extractor = load_inception(Path(weights), engine.device) if weights else None
        self._new_metrics = functools.partial(MetricCollection, CLASSES, deltas_of(task), self.extractor)

    def check_judge(self, config: Mapping[str, Any], given: Mapping[str, str]) -> None:
        """UserError if the segmenter is what a translator was trained with, or its targets matched by: it would see what it was
        told to. config: the translator's, flat. given: the hashes that its checkpoints have."""
        judge, teacher = self.config.segmenter, config.get(TEACHER)
        if self.segmenter is None or judge is None:
            return
        weights, option = weights_sha256(self.segmenter), None
        if TEACHER in given and (weights == given[TEACHER] or (teacher and _run_of(judge) == _run_of(teacher))):
            option = TEACHER
        elif weights == _matched_by(config, self.root):
            option = f"data.match {config['data.match']}"
        if option:
            raise UserError(f"the translator was trained with the segmenter {judge} (--{option}), which cannot judge it: "
                            "evaluate it with another, such as one of launch/train_segmenter.py --domain target")  # fmt: skip

    @functools.cached_property
    def judge(self) -> str:
        """What decides the metrics of a translator beside the data: the segmenter, and how many images."""
        weights = weights_sha256(self.segmenter)[:12] if self.segmenter else "no segmenter"
        return f"{weights}, {len(self.images.source_places)} images"

    def best_metric(self, name: str) -> str:
        """The metric that is meant, "auto" or by name, to compare checkpoints by. UserError if there will be none."""
        segmenter, extractor, images = self.segmenter, self.extractor, self.images
        available = {
            "mIoU": segmenter, "pxAcc": segmenter, "clsAcc": segmenter,
            "flip_rate": segmenter and images.targets and images.targets.split.label_space,
            "drift": segmenter, "Dist": images.paired, "FID": extractor and images.targets, "KID": extractor and images.targets,
        }  # fmt: skip
        found = [metric for metric in available if available[metric] and name in ("auto", metric)]
        if not found:
            wanted = "anything" if name == "auto" else f"evaluation.best = {name}"
            raise UserError(f"without pairs, labels or weights there is nothing to evaluate {wanted} by: "
                            "give --evaluation.segmenter or --evaluation.inception, or leave out evaluation.every")  # fmt: skip
        return found[0]

    def __call__(self, translator: Translator) -> Outcome | None:
        """Metrics and pictures on rank 0; None elsewhere. ToldToStop, on all ranks, if one of them is told to stop."""
        with exact_arithmetic():
            untranslated, real = self._references
            part = self._translate(translator)
            self._stop_if_told()
            parts = self.engine.gather(part)
        if parts is None:
            return None
        whole, *others = parts
        for part in others:
            whole.merge(part)
        return self._outcome(whole, untranslated, real)

    @functools.cached_property
    def _references(self) -> tuple[MetricCollection, MetricCollection]:
        """Whole on rank 0: the untranslated sources, and the real target images."""
        untranslated, real = self._new_metrics(), self._new_metrics()
        for place in self._mine(self.images.source_places, "untranslated sources"):
            image, target, label = self.images.source(place)
            untranslated.update(self._example(place, image, target, label))
        for place in self._mine(self.images.target_places, "real target images"):
            image, label = self.images.target(place)
            real.update(self._example(place, image, None, label))
        self._stop_if_told()
        others = (self.engine.gather((untranslated, real)) or [])[1:]
        for other_untranslated, other_real in others:
            untranslated.merge(other_untranslated)
            real.merge(other_real)
        return untranslated, real

    def _translate(self, translator: Translator) -> _Part:
        """Translate this rank's share and count it."""
        part = _Part(self._new_metrics())
        places = self.images.source_places
        shown = {places[i] for i in _spread(len(places), SHEET_ROWS)}
        for place in self._mine(places, "translations"):
            source, target, label = self.images.source(place)
            translation = translator(source, key=str(place))
            example = self._example(place, translation, target, label)
            part.metrics.update(example)
            if example.predicted is not None and label is not None:
                part.worst.update(
                    place, *_how_wrong(place, label, example.predicted), source=source, translation=translation,
                    predicted=example.predicted, truth=label, target=target,
                )  # fmt: skip
            if place in shown:
                part.rows[place] = [picture for picture in (source, translation, target) if picture is not None]
        return part

    def _example(self, place: int, image: np.ndarray, target: np.ndarray | None, label: np.ndarray | None) -> Example:
        predicted = self.segmenter(image) if self.segmenter and label is not None else None
        return Example(place, image, target, label, predicted)

    def _mine(self, places: list[int], what: str) -> Iterator[int]:
        mine: Iterable[int] = places[self.engine.rank :: self.engine.world_size]
        hidden = None if self.progress else True  # None: where stderr is no terminal
        stop = current()
        return itertools.takewhile(
            lambda place: not stop.told, tqdm(mine, what, unit="image", leave=False, disable=hidden)
        )

    def _stop_if_told(self) -> None:
        """ToldToStop, on all ranks, if one of them was told: what they have counted may lack images."""
        if self.engine.any(current().told):
            raise ToldToStop

    def _outcome(self, part: _Part, untranslated: MetricCollection, real: MetricCollection) -> Outcome:
        rows = tuple(tuple(part.rows[place]) for place in sorted(part.rows))
        pictures = {"evaluation": _sheet(rows)}
        train_targets = self.images.manifest.splits.get("train/target")  # absent where data are only tested on
        trained_on = train_targets.class_histogram if train_targets else None
        metrics = compute_metrics(part.metrics, untranslated, real, trained_on)
        seen, seen_in_real = part.metrics.segmentation, real.segmentation
        if seen:
            pictures["worst_images"] = part.worst.page()
            if seen_in_real:
                distributions = class_distributions(seen.confusion, seen_in_real.confusion, trained_on)
                pictures["class_distribution"] = distribution_chart(distributions)
                pictures["flips"] = flip_chart(flips(seen.confusion, seen_in_real.confusion))
        return Outcome(len(self.images.source_places), metrics, pictures, rows)
