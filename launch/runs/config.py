"""The one configuration tree of a translator's training, and how any job's is put together from presets, a file and the
command line."""

import argparse
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import Any, ClassVar, Protocol

from infra.config import OptionParser, add_options, build, check_names, completed, flatten, option, read_yaml
from infra.errors import UserError
from pipelines.config import DataConfig
from trainer.engines import EngineConfig
from trainer.evaluation.config import EvaluationConfig
from trainer.loop import LoopConfig
from trainer.methods import METHODS, MethodConfig, SrunitConfig
from trainer.methods.former import todays_names
from trainer.optim import OptimConfig
from trainer.tasks import TASKS, overview, preset

DEFAULT_TASK, DEFAULT_METHOD = "gta2city", "srunit"
METHODS_SECTION = "methods."  # of a file: options by method


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
    """Of any method; `job_class` gives the tree with the options of one."""

    task: str = option(
        DEFAULT_TASK, "the pair of domains: a preset of everything below", flag="--task", choices=tuple(TASKS)
    )
    seed: int = option(
        0, "fixes initialisation, sample order, crops, flips and every draw of the method", flag="--seed"
    )
    run_dir: str | None = option(
        None, "folder of the run; the same command again continues it [runs/TASK-METHOD-TIME]",
        flag="--run-dir", resumable=True,
    )  # fmt: skip
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=SrunitConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.method.whole_batch and self.optim.accumulation > 1:
            raise UserError(
                f"{self.method.whole_batch} needs the whole global batch at once: leave out optim.accumulation"
            )


@functools.cache
def job_class(method: str) -> type[JobConfig]:
    """The tree whose section `method` has the options of this one."""
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    config = METHODS[method].config
    name = option(method, "the method, whose options are those of the section method", flag="--method",
                  choices=tuple(METHODS))  # fmt: skip
    section = make_dataclass(config.__name__, [("name", str, name)], bases=(config,), frozen=True, kw_only=True)
    return make_dataclass(
        "JobConfig",
        [("method", section, field(default_factory=section))],
        bases=(JobConfig,),
        frozen=True,
        kw_only=True,
    )


def check_seed(seed: int) -> None:
    if seed < 0:
        raise UserError(f"seed {seed} is negative: give a whole number from 0 up")


def presets(task: str, method: str) -> dict[str, Any]:
    """The layer under the user's own options: what the method's paper does, then what is done for this task, and then what
    the method's paper does for this task."""
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    family = METHODS[method]
    return {"task": task, **family.options, **preset(task), **family.on_tasks.get(task, {})}


def make_config(*layers: Mapping[str, Any]) -> JobConfig:
    """The job that flat layers of options describe, on top of the presets of the task and method that they name."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    method = str(merged.get("method.name", DEFAULT_METHOD))
    cls = job_class(method)
    chosen = [_of_method(layer, method) for layer in layers]
    return build(cls, presets(str(merged.get("task", DEFAULT_TASK)), method), *chosen)


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two layers as one, of which `make_config` makes the same: what the upper one says of the method that is in use holds over
    what the lower one says of single methods."""
    of_any = {name.removeprefix("method.") for name in over if name.startswith("method.")}

    def holds(name: str) -> bool:
        return not (name.startswith(METHODS_SECTION) and _rest(name) in of_any)

    return {**{name: value for name, value in under.items() if holds(name)}, **over}


def _rest(name: str) -> str:
    """methods.srunit.robust.beta: robust.beta."""
    return name.removeprefix(METHODS_SECTION).partition(".")[2]


def _of_method(layer: Mapping[str, Any], method: str) -> dict[str, Any]:
    """A layer without what it has for other methods alone: a file may say `methods: {srunit: {robust: {beta: 0.001}}}`.
    UserError if a method that it names has no such option."""
    result = {name: value for name, value in layer.items() if not name.startswith(METHODS_SECTION)}
    for name, value in layer.items():
        if name.startswith(METHODS_SECTION):
            other, _, rest = name.removeprefix(METHODS_SECTION).partition(".")
            check_names(job_class(other), [f"method.{rest}"])
            if other == method:
                result[f"method.{rest}"] = value
    return result


def parse_arguments(arguments: Sequence[str], under: Mapping[str, Any] | None = None) -> JobConfig:
    """The job that a command line describes: presets < under < --config FILE < options."""
    under = under or {}
    parser = OptionParser(
        usage="%(prog)s [--task TASK] [--method METHOD] [--data ROOT] [options]",
        description="Train an unpaired image-to-image translator. The options of the section method are those of the method "
        "named on this line or in its --config; values in [brackets] are its defaults for the task.",
        epilog=f"tasks:\n{overview()}\n\n"
        "example: deepspeed launch/train.py --task gta2city --data data/gta2city --beta 1e-4 --T 0.1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    config = make_config(under, task_and_method(arguments))
    file, given = read_options(parser, type(config), flatten(config), arguments)
    return make_config(under, todays_names(file), given)


def task_and_method(arguments: Sequence[str]) -> dict[str, Any]:
    """What a command line, or the file that it names, says of these two: a layer."""
    early = OptionParser(add_help=False, allow_abbrev=False)
    early.add_argument("--task", default=argparse.SUPPRESS)
    early.add_argument("--method", "--method.name", dest="method.name", default=argparse.SUPPRESS)
    early.add_argument("--config", default=argparse.SUPPRESS)
    known = vars(early.parse_known_args(arguments)[0])
    path = known.pop("config", None)
    named = (todays_names(read_yaml(path)) if path else {}) | known
    return {name: named[name] for name in ("task", "method.name") if name in named}


def of_any_age(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A translator's flat configuration that some version saved whole, as this version would have saved it."""
    named = todays_names(saved)
    return completed(job_class(str(named["method.name"])), named)


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
