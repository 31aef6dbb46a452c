"""The training of a segmenter: what `launch/train_segmenter.py` runs."""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from infra.config import OptionParser, build, flatten, option
from infra.devices import usual_device
from infra.errors import UserError
from infra.storage import open_storage, replacing
from infra.views import LabelledCrop, View
from launch.runs.config import check_seed, read_options
from launch.runs.data import EMBEDDED_TASK, find_data
from launch.runs.folder import RunFolder
from launch.runs.sampler import Draw
from launch.runs.training import Job, run
from pipelines.config import DataConfig
from pipelines.dataset import ImageDataset
from pipelines.labels import CLASSES, colourise
from pipelines.manifest import DOMAINS, Split, load_manifest
from trainer.checkpoint import Checkpoint
from trainer.draws import generator
from trainer.engines import EngineConfig
from trainer.evaluation.confusion import ConfusionMatrix
from trainer.loop import LoopConfig
from trainer.optim import OptimConfig
from trainer.pyfunc import save_pyfunc_model
from trainer.samples import stack
from trainer.segmentation.class_weights import ClassWeights
from trainer.segmentation.config import SegmenterModelConfig, init_weights
from trainer.segmentation.method import RECIPES, Segmentation
from trainer.segmentation.segmenter import Segmenter
from trainer.segmentation.trained import as_segmenter, load_trained

log = logging.getLogger(__name__)

SHOWN = ("pxAcc", "clsAcc", "mIoU")


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    domain: str = option(
        "target", "the side of the data whose labelled images train it", flag="--domain", choices=DOMAINS
    )
    test_domain: str | None = option(
        None, "the side whose labelled test images it is scored on, as of an adapted segmenter [that of --domain]",
        flag="--test-domain", choices=DOMAINS, resumable=True,
    )  # fmt: skip
    seed: int = option(0, "fixes initialisation, sample order, crops and flips", flag="--seed")
    jitter: float = option(
        0.0, "random changes of colours, contrast, blur and noise of training images, so that other looks are seen right: 0, "
        "none, to 1, strong", flag="--jitter",
    )  # fmt: skip
    class_weights: float = option(
        0.0, "weigh each class in the loss by its share of the pixels to the power of minus this: 0, all pixels alike, to 1, all "
        "classes alike; 0.5 helps rare ones", flag="--class-weights",
    )  # fmt: skip
    run_dir: str | None = option(
        None, "folder of the run; the same command again continues it [runs/segmenter-NETWORK-TIME]",
        flag="--run-dir", resumable=True,
    )  # fmt: skip
    data: DataConfig = field(default_factory=DataConfig)
    model: SegmenterModelConfig = field(default_factory=SegmenterModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not 0 <= self.jitter <= 1:
            raise UserError(f"--jitter {self.jitter:g} is a strength: give a number from 0 (none) to 1 (strong)")
        if not 0 <= self.class_weights <= 1:
            raise UserError(
                f"--class-weights {self.class_weights:g} is a power: give a number from 0 (pixels alike) to 1 (classes alike)"
            )


def make_config(*layers: Mapping[str, Any]) -> SegmenterConfig:
    """The job that flat layers of options describe, on top of the recipe of the network that they name."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    recipe = RECIPES.get(str(merged.get("model.network", SegmenterModelConfig().network)), {})
    return build(SegmenterConfig, {"data.crop": None}, recipe, merged)


def parse_arguments(arguments: Sequence[str]) -> SegmenterConfig:
    """The job that a command line describes: the network's recipe < --config FILE < options."""
    early = OptionParser(add_help=False, allow_abbrev=False)
    early.add_argument("--network", "--model.network", dest="model.network", default=argparse.SUPPRESS)
    named = vars(early.parse_known_args(arguments)[0])
    parser = OptionParser(
        usage="%(prog)s [--data ROOT] [--domain DOMAIN] [--network NETWORK] [options]",
        description="Train a semantic segmenter on the labelled images of one domain, to evaluate translations with. Values "
        "in [brackets] are the defaults of the network named on this line.",
        epilog="example: python launch/train_segmenter.py --data data/gta2city --domain target --network drn-d-22",
        allow_abbrev=False,
    )
    return make_config(*read_options(parser, SegmenterConfig, flatten(make_config(named)), arguments))


class SegmenterJob(Job[SegmenterConfig]):
    script = "launch/train_segmenter.py"
    unit = "images"
    shorter = "give a lower --optim.epochs, or prepare smaller images"
    model = "segmenter"
    experiment = "segmenter"

    @staticmethod
    def run_name(config: SegmenterConfig) -> str:
        return f"segmenter-{config.model.network}"

    @staticmethod
    def find_data(config: SegmenterConfig, before: str | None) -> str:
        return find_data(EMBEDDED_TASK, config.data.root, before)

    @property
    def title(self) -> str:
        return f"segmenter {self.config.model.network} on the {self.config.domain} images of {self._root}"

    @property
    def view(self) -> View:
        return LabelledCrop(domain=self.config.domain)

    def method(self) -> Segmentation:
        network = self.config.model.build(len(CLASSES))
        init_weights(network, generator("cpu", self.config.seed, "init", "segmenter"))
        weights = ClassWeights(len(CLASSES), self.config.class_weights) if self.config.class_weights else None
        return Segmentation(network, self.config.jitter, weights, self.config.optim.global_batch)

    def sample_picture(self) -> Draw:
        """Test images (train, where there are none) from all over the split: photo | predicted labels | true labels."""
        data, rows, split = self.config.data, self.config.loop.samples, self._split("train", self.config.domain)
        samples = ImageDataset(self._root, "test", self._test_domain, fallback="train", cache_dir=data.cache_dir)
        shown = [samples.read(row * len(samples) // rows) for row in range(min(rows, len(samples)))]

        def draw(network: nn.Module, device: torch.device) -> np.ndarray:
            segmenter = as_segmenter(
                network.get_submodule("segmenter"),
                name=self.run_name(self.config),
                input_size=split.image_size,
                label_space=str(split.label_space),
                device=device,
            )
            pictures = [
                [image, colourise(segmenter(image)), *([] if label is None else [colourise(label)])]
                for image, label in shown
            ]
            return stack([stack(row, axis=1) for row in pictures], axis=0)

        return draw

    def facts(self) -> dict[str, Any]:
        split = self._split("train", self.config.domain)
        return {"image_size": split.image_size, "label_space": split.label_space}

    def publish(self, folder: RunFolder, checkpoint: Path) -> None:
        segmenter = load_trained(checkpoint, usual_device())
        if self._split("test", self._test_domain).label_space is None:
            log.info("not scored: %s has no labelled test images of the %s domain", self._root, self._test_domain)
        else:
            data = self.config.data
            scores = score(segmenter, self._root, self._test_domain, data.cache_dir)
            scores["step"] = Checkpoint(checkpoint).state["step"]
            with replacing(folder.evaluation_file) as file:
                file.write((json.dumps(scores, indent=1) + "\n").encode())
        save_pyfunc_model(folder.model, checkpoint, ["segmenter"], load_trained)

    @property
    def _root(self) -> str:
        return str(self.config.data.root)

    @property
    def _test_domain(self) -> str:
        return self.config.test_domain or self.config.domain

    def _split(self, split: str, domain: str) -> Split:
        """A domain's images of a split; an empty split if there are none."""
        return load_manifest(open_storage(self._root)).splits.get(f"{split}/{domain}", Split((), (0, 0)))


def score(segmenter: Segmenter, root: str, domain: str, cache_dir: str | None = None) -> dict[str, Any]:
    """What `ConfusionMatrix.scores` gives for the labelled test images of a domain."""
    samples = ImageDataset(root, "test", domain, cache_dir=cache_dir)
    matrix = ConfusionMatrix(CLASSES)
    for i in range(len(samples)):
        image, label = samples.read(i)
        if label is not None:
            matrix.update(label, segmenter(image))
    scores = matrix.scores()
    shown = ", ".join(f"{name} {scores[name]:.1%}" for name in SHOWN)
    log.info("%s on the %d test images of the %s domain", shown, len(samples), domain)
    return scores


def train(config: SegmenterConfig) -> Path:
    """Train, or continue, a segmenter to the end on this process's rank; returns the run folder. Errors: see `run`."""
    return run(SegmenterJob, config)
