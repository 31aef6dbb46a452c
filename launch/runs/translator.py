"""The training of a translator: what `launch/train.py` runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from infra.config import flatten
from infra.errors import UserError
from infra.views import View
from launch.runs.config import JobConfig
from launch.runs.data import find_data
from launch.runs.evaluation import Evaluator, Outcome
from launch.runs.folder import RunFolder
from launch.runs.sampler import Draw
from launch.runs.training import Job, Listener, run
from launch.runs.validation import Validation
from pipelines.dataset import ImageDataset
from pipelines.manifest import DOMAINS
from trainer.engines import Engine
from trainer.evaluation.config import EvaluationConfig
from trainer.methods import Method
from trainer.pyfunc import save_pyfunc_model
from trainer.samples import sample_grid
from trainer.translation import Translation
from trainer.translator import Translator, load_translator


class TranslatorJob(Job[JobConfig]):
    script = "launch/train.py"
    unit = "pairs"
    shorter = "use --config launch/demo.yaml, as `make demo` does"
    model = "generator"

    @staticmethod
    def run_name(config: JobConfig) -> str:
        return f"{config.task}-{config.method.name}"

    @staticmethod
    def find_data(config: JobConfig, before: str | None) -> str:
        return find_data(config.task, config.data.root, before)

    @staticmethod
    def whole_batch(config: JobConfig) -> bool:
        return bool(config.method.whole_batch)

    @property
    def experiment(self) -> str:
        return self.config.task

    @property
    def title(self) -> str:
        return f"{self.config.method.name} on {self.config.task}"

    @property
    def view(self) -> View:
        return self.config.method.view

    def method(self) -> Method[Any, Any]:
        return self.config.method.build(seed=self.config.seed, global_batch=self.config.optim.global_batch)

    def sample_picture(self) -> Draw:
        """A grid of test sources (train, where there are no test images) from all over the split, each beside its
        translation and a target image of another scene."""
        data, rows = self.config.data, self.config.loop.samples
        sources, targets = (
            ImageDataset(str(data.root), "test", domain, fallback="train", cache_dir=data.cache_dir)
            for domain in DOMAINS
        )
        rows = min(rows, len(sources))
        source_images = [sources.read(row * len(sources) // rows)[0] for row in range(rows)]
        # Half a split further on: in paired data the target in the same place is the same scene.
        places = [(row * len(targets) // rows + len(targets) // 2) % len(targets) for row in range(rows)]
        target_images = [targets.read(place)[0] for place in places]

        def draw(network: nn.Module, device: torch.device) -> np.ndarray:
            assert isinstance(network, Translation)
            return sample_grid(Translator(network, device, seed=self.config.seed), source_images, target_images)

        return draw

    def validation(self, engine: Engine, given: Mapping[str, str]) -> Validation | None:
        config = self.config.evaluation
        if not config.every:
            unused = [name for name, value in flatten(config).items() if value != getattr(EvaluationConfig(), name)]
            if unused:
                raise UserError(f"evaluation.{unused[0]} is for evaluations during training, and there are none: give "
                                "--evaluation.every, such as 0.5 epochs, or leave it out")  # fmt: skip
            return None
        data = self.config.data
        evaluator = Evaluator(str(data.root), self.config.task, engine, config, data.cache_dir, progress=False)
        evaluator.check_judge(flatten(self.config), given)

        def evaluate(network: nn.Module, device: torch.device) -> Outcome | None:
            assert isinstance(network, Translation)
            return evaluator(Translator(network, device, seed=self.config.seed))

        return Validation(config.every, evaluate, evaluator.best_metric(config.best), evaluator.judge)

    def publish(self, folder: RunFolder, checkpoint: Path) -> None:
        networks = [name for name, _ in self.config.method.translation().named_children()]
        save_pyfunc_model(folder.model, checkpoint, networks, load_translator)


def train(config: JobConfig, *, tags: Mapping[str, str] | None = None, listener: Listener | None = None) -> Path:
    """Train, or continue, a translator to the end on this process's rank; returns the run folder. See `run`."""
    return run(TranslatorJob, config, tags=tags, listener=listener)
