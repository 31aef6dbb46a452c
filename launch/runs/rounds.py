"""Rounds: a segmenter of the sources helps to train a translator, whose translations train a better segmenter, and so on.

OUT/segmenter-0             S of round 0, trained on the sources and their labels, under random looks
OUT/round-0/translator      trained with target crops matched by S, and L_sem by S
OUT/round-0/data            the sources as it translates them, with their labels, and the targets, labelled where S is sure
OUT/round-0/segmenter.json  what S scores on the target's test images
OUT/segmenter-1             S of the next round, trained on these data
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infra.config import flatten
from infra.console import setup_logging
from infra.devices import usual_device
from infra.errors import UserError
from infra.json_lines import read_json
from infra.storage import open_storage, replacing
from infra.tables import plain
from launch.matching import matched
from launch.runs import segmenter as segmenters
from launch.runs.config import JobConfig, make_config
from launch.runs.evaluation import check_judged_by, load_judge
from launch.runs.folder import RunFolder
from launch.runs.translator import train
from launch.translating.roots import translated_part
from pipelines.derived import Part, derive, encoding_of
from pipelines.manifest import DOMAINS, load_manifest
from pipelines.matching.make import MatchOptions, lattices_of
from pipelines.shards import Sample
from trainer.segmentation.segmenter import Segmenter
from trainer.segmentation.trained import load_trained, weights_hash
from trainer.translator import load_translator

WEIGHT = 1.0  # of L_sem, where the options give none
# Of the metrics of a round what a table calls them, and their form.
SHOWN = {
    "segmenter": ("mIoU of S", "{:.1%}"), "flip_rate": ("flip rate", "{:.1%}"), "mIoU": ("mIoU", "{:.1%}"),
    "drift": ("drift", "{:.1%}"), "Dist": ("Dist", "{:.2f}"),
}  # fmt: skip

log = logging.getLogger(__name__)


class SureLabels:
    """What becomes of samples: their label is what a segmenter sees where its probability is at least `sure`, else none."""

    def __init__(self, segmenter: Segmenter, sure: float) -> None:
        self.segmenter, self.sure = segmenter, sure

    def __call__(self, samples: list[Sample]) -> list[Sample]:
        return [
            Sample(each.key, each.image, self.segmenter.sure(np.asarray(each.image), self.sure), each.origin)
            for each in samples
        ]

    @property
    def identity(self) -> str:
        return f"{_hash(self.segmenter)} {self.sure}"


class Rounds:
    """Every stage is made when it is asked for, and kept; one that was stopped is continued by asking again.

    out: the folder of all runs. translator: the options of each, on a data root whose sources have labels. segmenter: options of
    each, over their recipe. sure: see `SureLabels`. first: the run of a segmenter to begin with, which is otherwise trained.
    UserError for data and options that cannot do.
    """

    def __init__(
        self,
        out: Path,
        translator: JobConfig,
        segmenter: Mapping[str, Any],
        sure: float = 0.9,
        first: Path | None = None,
    ) -> None:
        if not 0 <= sure <= 1:
            raise UserError(f"--sure {sure:g} is a probability: give a number from 0 to 1")
        assert translator.data.root is not None
        self.out, self.options, self.segmenter_options, self.sure = out, translator, segmenter, sure
        self.root = translator.data.root
        self.manifest = load_manifest(open_storage(self.root))
        source, target = (self.manifest.split("train", domain) for domain in DOMAINS)
        if source.label_space is None:
            raise UserError(
                f"the sources of {self.root} have no labels to train a segmenter on: prepare them with labels"
            )
        if source.image_size != target.image_size:
            raise UserError(f"sources and targets of {self.root} differ in size: prepare both in one, since translations and "
                            "targets train one segmenter")  # fmt: skip
        options = MatchOptions(by="segmenter", name="crops", crop=translator.data.crop)
        lattices_of({"source": source, "target": target}, options)  # of each match: that crops can be cut
        if judge := translator.evaluation.segmenter:
            place = Path(judge).resolve()
            folders = [each.name for each in (place, *place.parents) if each.parent == out.resolve()]
            if any(re.fullmatch(r"segmenter-\d+", name) for name in folders):
                raise UserError(f"the judge {judge} is one of the segmenters that these rounds train with: give another, such as "
                                "one of launch/train_segmenter.py --domain target")  # fmt: skip
            load_judge(Path(judge), self.root, self.manifest.split("test", "source"))  # which is needed hours later
        self.first = first
        self._segmenters: dict[int, Path] = {}
        self._translators: dict[int, Path] = {}

    def segmenter(self, number: int) -> Path:
        """The run of S in a round, counted from 0."""
        if number not in self._segmenters:
            self._segmenters[number] = self.first if number == 0 and self.first else self._train_segmenter(number)
        return self._segmenters[number]

    def _train_segmenter(self, number: int) -> Path:
        root, domain = (self.root, "source") if number == 0 else (self._data(number - 1), "target")
        log.info("round %d: the segmenter, on %s", number, root)
        given = {
            "data.root": root, "domain": domain, "seed": self.options.seed, "run_dir": str(self.out / f"segmenter-{number}"),
        }  # fmt: skip
        return _trained(segmenters.train(segmenters.make_config(self.segmenter_options, given)))

    def translator(self, number: int) -> Path:
        """The run of the translator in a round."""
        if number not in self._translators:
            segmenter, options = self.segmenter(number), self.options
            log.info("round %d: the translator", number)
            match = matched(self.root, "segmenter", options.data.crop, segmenter)
            given = {
                "data.match": match, "method.semantic.segmenter": str(segmenter),
                "run_dir": str(self._folder(number) / "translator"),
            }  # fmt: skip
            self._translators[number] = _trained(train(make_config(flatten(options), given)))
        return self._translators[number]

    def _data(self, number: int) -> str:
        """The root that the next round's segmenter is trained on: all in its target domain."""
        device = usual_device()
        translator = load_translator(self.translator(number), device)
        labels = SureLabels(load_trained(self.segmenter(number), device), self.sure)
        log.info("round %d: translations and labels of targets", number)
        target = self.manifest.split("train", "target")
        parts = [
            translated_part(translator, self.root, "train/source"),
            Part(open_storage(self.root), target, labels, labels.identity, prefix="target-"),
        ]
        out, cache = str(self._folder(number) / "data"), self.options.data.cache_dir
        parameters = {"source": "round", "sure": self.sure}
        derive(
            {"train/target": parts}, open_storage(out), encoding_of(self.manifest), parameters,
            cache_dir=Path(cache) if cache else None,
        )  # fmt: skip
        return out

    def metrics(self, number: int) -> dict[str, float]:
        """Those of SHOWN that there are: of the translator its last evaluation, and "segmenter": the mIoU of S on the labelled
        target test images, if there are any. UserError for a translator that another judge evaluated, or none."""
        folder = RunFolder(self.translator(number))
        last = (folder.evaluations() or [{}])[-1]
        if judge := self.options.evaluation.segmenter:
            check_judged_by(folder, Path(judge))
            if "mIoU" not in last:
                raise UserError(f"{folder.path} was trained without a judge: leave out --judge and evaluate it with "
                                "launch/evaluate.py --segmenter, or name another --out")  # fmt: skip
        found = {name: last[name] for name in SHOWN if isinstance(last.get(name), float)}
        tests = self.manifest.splits.get("test/target")
        if tests is not None and tests.label_space:
            found["segmenter"] = self._score(number)
        return found

    def _score(self, number: int) -> float:
        """The mIoU of a round's S on the target test images, which is kept beside the hash of its weights."""
        file = self._folder(number) / "segmenter.json"
        segmenter = load_trained(self.segmenter(number), usual_device())
        weights, known = _hash(segmenter), read_json(file, dict) or {}
        if known.get("weights") == weights and isinstance(known.get("mIoU"), float):
            return float(known["mIoU"])
        score = segmenters.score(segmenter, self.root, "target", self.options.data.cache_dir)["mIoU"]
        with replacing(file) as opened:
            opened.write((json.dumps({"weights": weights, "mIoU": score}) + "\n").encode())
        return float(score)

    def _folder(self, number: int) -> Path:
        return self.out / f"round-{number}"


def table(rounds: Sequence[Mapping[str, float]]) -> str:
    """The metrics of rounds as aligned lines."""
    columns = [name for name in SHOWN if any(name in found for found in rounds)]
    rows = [
        [str(number), *(SHOWN[name][1].format(found[name]) if name in found else "–" for name in columns)]
        for number, found in enumerate(rounds)
    ]
    return plain(["round", *(SHOWN[name][0] for name in columns)], rows)


def _trained(run_dir: Path) -> Path:
    """After a training, whose log file what follows has nothing to do with."""
    setup_logging(None)
    return run_dir


def _hash(segmenter: Segmenter) -> str:
    network = segmenter.logits
    assert isinstance(network, torch.nn.Module)
    return weights_hash(network)
