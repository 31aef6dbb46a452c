"""The one configuration tree of a translator's training, and how any job's is put together from presets, a file and the
command line."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from infra.config import OptionParser, add_options, build, flatten, option, read_yaml
from infra.errors import UserError
from pipelines.loader import DataConfig
from trainer.engines import EngineConfig
from trainer.evaluation.config import EvaluationConfig
from trainer.loop import LoopConfig
from trainer.methods import METHODS
from trainer.methods.cut import CutConfig
from trainer.networks.config import ModelConfig
from trainer.optim import OptimConfig
from trainer.tasks import TASKS, overview, preset


class TrainingConfig(Protocol):
    """What the configuration of every kind of training job has."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def seed(self) -> int: ...
    @property
    def run_dir(self) -> str | None: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def engine(self) -> EngineConfig: ...
    @property
    def loop(self) -> LoopConfig: ...


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    task: str = option(
        "gta2city", "the pair of domains: a preset of everything below", flag="--task", choices=tuple(TASKS)
    )
    seed: int = option(
        0, "fixes initialisation, sample order, crops, flips and every draw of the method", flag="--seed"
    )
    run_dir: str | None = option(
        None, "folder of the run; the same command again continues it [runs/TASK-METHOD-TIME]",
        flag="--run-dir", resumable=True,
    )  # fmt: skip
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: CutConfig = field(default_factory=CutConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.method.all_negatives and self.optim.accumulation > 1:
            raise UserError("method.all_negatives needs the whole global batch at once: leave out optim.accumulation")


def check_seed(seed: int) -> None:
    if seed < 0:
        raise UserError(f"seed {seed} is negative: give a whole number from 0 up")


def presets(task: str, method: str) -> dict[str, Any]:
    """The layer under the user's own options: what the method's paper does, then what it does for this task."""
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    return {"task": task, "method.name": method, **METHODS[method], **preset(task)}


def make_config(*layers: Mapping[str, Any]) -> JobConfig:
    """The job that flat layers of options describe, on top of the presets of the task and method that they name."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    chosen = presets(str(merged.get("task", "gta2city")), str(merged.get("method.name", "srunit")))
    return build(JobConfig, chosen, merged)


def parse_arguments(arguments: Sequence[str]) -> JobConfig:
    """The job that a command line describes: presets < --config FILE < options."""
    early = OptionParser(add_help=False, allow_abbrev=False)
    early.add_argument("--task", default="gta2city")
    early.add_argument("--method", "--method.name", default="srunit")
    known, _ = early.parse_known_args(arguments)
    shown = known.task in TASKS and known.method in METHODS
    defaults = flatten(make_config({"task": known.task, "method.name": known.method}) if shown else make_config())

    parser = OptionParser(
        usage="%(prog)s [--task TASK] [--data ROOT] [options]",
        description="Train an unpaired image-to-image translator. Values in [brackets] are the defaults of the task and "
        "method named on this line.",
        epilog=f"tasks:\n{overview()}\n\n"
        "example: deepspeed launch/train.py --task gta2city --data data/gta2city --beta 1e-4 --T 0.1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return make_config(*read_options(parser, JobConfig, defaults, arguments))


def read_options(
    parser: OptionParser, cls: type, defaults: Mapping[str, Any], arguments: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two layers that a command line gives for a job of this configuration class: its --config FILE, its options.

    defaults: what --help shows.
    """
    parser.add_argument("--config", metavar="FILE", help="YAML file of options, under those of the command line")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    add_options(parser, cls, defaults)
    given = parser.options(arguments)
    del given["local_rank"]
    path = given.pop("config")
    return read_yaml(path) if path else {}, given
