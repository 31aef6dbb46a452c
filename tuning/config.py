"""What a search is asked for: its own options, the space, and the options that all its trials share."""

import argparse
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from infra.config import OptionParser, build, flatten, option, read_yaml
from infra.errors import UserError
from launch.runs.config import JobConfig, make_config, merged, read_options, task_and_method
from launch.runs.data import EMBEDDED_TASK
from pipelines.manifest import MANIFEST
from trainer.evaluation.config import BETTER
from trainer.methods.former import todays_names
from tuning.ablations import TABLES

SECTION = "search."
SPACE = "space"
RESTARTABLE = ("address", "dashboard", "max_concurrent")  # may be given again with --resume
# Under the user's own options: what a run of many has no need to keep.
QUIET = {"loop.keep": 1, "loop.keep_logged": 0}

EXAMPLES = """Every option of launch/train.py is one of all trials alike. Values in [brackets] are defaults.

examples:
  python tuning/search.py
  python tuning/search.py --task gta2city --data data/gta2city --trials 20 --searcher optuna --scheduler asha
  python tuning/search.py --space "optim.lr=loguniform(1e-5,1e-3)" "method.temperature=choice(0.05,0.07,0.1)"
  python tuning/search.py --ablations srunit --seeds 3
  python tuning/search.py --resume beta-T-20260101-120000"""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    name: str | None = option(None, "results go to runs/search-NAME [SPACE-TIME]", flag="--name")
    resume: str | None = option(None, "continue runs/search-NAME: finished trials are not run again", flag="--resume")
    trials: int | None = option(None, "number of trials [10; a grid, taps: all combinations]", flag="--trials")
    metric: str | None = option(
        None, "metric to be best in [mIoU with a segmenter, else Dist, else FID]", flag="--metric", choices=tuple(BETTER)
    )  # fmt: skip
    searcher: str = option(
        "random", "how values are chosen; optuna: TPE, which learns from the trials before", flag="--searcher",
        choices=("grid", "random", "optuna"),
    )  # fmt: skip
    scheduler: str = option(
        "none", "asha stops trials that fall behind; pbt has them take over weights and options of better ones",
        flag="--scheduler", choices=("none", "asha", "pbt"),
    )  # fmt: skip
    ranks_per_trial: int = option(1, "processes of one trial", flag="--ranks-per-trial")
    gpus_per_trial: float | None = option(
        None, "GPUs of one trial, 0.5 for two trials on one [one per rank where there are GPUs]", flag="--gpus-per-trial"
    )  # fmt: skip
    max_concurrent: int | None = option(
        None, "trials at once [as many as there are resources for]", flag="--max-concurrent"
    )
    address: str | None = option(None, "HOST:PORT of a Ray cluster, or auto [Ray is started here]", flag="--address")
    dashboard: bool = option(False, "start Ray's dashboard too (needs ray[default])", flag="--dashboard")
    ablations: str | None = option(
        None, "instead of a search: the ablations of a paper", flag="--ablations", choices=tuple(TABLES)
    )
    seeds: int = option(3, "ablations: runs of each row", flag="--seeds")

    def __post_init__(self) -> None:
        for name in ("trials", "ranks_per_trial", "max_concurrent", "seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} is impossible: give 1 or more")
        if self.gpus_per_trial is not None and self.gpus_per_trial < 0:
            raise UserError(f"--gpus-per-trial {self.gpus_per_trial} is impossible: give 0 or more, such as 0.5")
        if self.gpus_per_trial and self.gpus_per_trial % 1 and self.ranks_per_trial > 1:
            raise UserError("several ranks cannot share a GPU: give whole --gpus-per-trial, or --ranks-per-trial 1")
        for name in ("name", "resume"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.-]+", value):
                raise UserError(f"--{name} {value!r} is no name of a folder: use letters, digits, '.', '-' and '_'")


def _tree(job: type[JobConfig]) -> type:
    """All options of the command line: those of the trials, and the search's."""
    search = ("search", SearchConfig, field(default_factory=SearchConfig))
    return make_dataclass("Tree", [search], bases=(job,), frozen=True, kw_only=True)


@dataclass(frozen=True)
class Request:
    """search: how. space: what varies, as texts; empty for ablations. options: flat, of all trials; embedded: nothing
    was said of the data, so the search draws its own at a size that fits this machine."""

    search: SearchConfig
    space: tuple[str, ...]
    options: Mapping[str, Any]

    @property
    def embedded(self) -> bool:
        task = self.options.get("task", EMBEDDED_TASK)
        prepared = (Path("data") / EMBEDDED_TASK / MANIFEST).exists()  # where launch/train.py looks first
        return "data.root" not in self.options and task == EMBEDDED_TASK and not prepared

    def flat(self) -> dict[str, Any]:
        """As one layer, which `from_file` reads back."""
        search = {SECTION + name: value for name, value in flatten(self.search).items() if value is not None}
        return {**search, SPACE: list(self.space), **self.options}


def from_file(path: Path) -> Request:
    return _request(read_yaml(path))


def _request(layer: Mapping[str, Any]) -> Request:
    own = {name.removeprefix(SECTION): value for name, value in layer.items() if name.startswith(SECTION)}
    search = build(SearchConfig, own)
    options = {name: value for name, value in layer.items() if not name.startswith(SECTION) and name != SPACE}
    space = tuple(layer.get(SPACE) or (() if search.ablations else ("beta-T",)))
    if search.ablations and space:
        raise UserError("--ablations and --space exclude each other: leave out one of them")
    if "run_dir" in options:
        raise UserError("each trial has a run folder of its own: leave out --run-dir, and name the search with --name")
    if options.get("loop.mirror"):
        raise UserError("each trial would take the others' checkpoints out of one mirror: leave out --loop.mirror")
    if options.get("loop.max_steps"):
        raise UserError("trials are judged by parts of their schedule: leave out --loop.max-steps, and give fewer epochs, "
                        "--optim.epochs and --optim.decay-epochs")  # fmt: skip
    make_config(options)
    return Request(search, space, options)


def parse_arguments(arguments: Sequence[str]) -> Request:
    """What a command line asks for; with --resume only that and RESTARTABLE options, laid over nothing."""
    parser = OptionParser(
        usage="%(prog)s [--task TASK] [--data ROOT] [--space SPACE …] [--trials N] [options]",
        description="Search options of a translator with Ray Tune, or run the papers' ablations.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument(
        "--space", nargs="+", action="extend", metavar="SPACE",
        help='what varies: beta-T, taps, lr-batch, or any field as "FIELD=loguniform(1e-5,1e-3)", also uniform, randint '
        "and choice [beta-T]",
    )  # fmt: skip
    job = make_config(task_and_method(arguments))
    file, given = read_options(parser, _tree(type(job)), flatten(SearchConfig()) | flatten(job), arguments)
    if given[SPACE] is None:
        del given[SPACE]
    request = _request(merged(todays_names(file), given))
    if request.search.resume:
        allowed = {SECTION + name for name in ("resume", *RESTARTABLE)}
        if strangers := sorted(given.keys() - allowed) or sorted(file):
            raise UserError(f"--resume goes on as the search was begun, so {strangers[0].removeprefix(SECTION)} has no "
                            "place beside it: leave it out, or begin another search")  # fmt: skip
    return request


def default_name(request: Request) -> str:
    what = request.search.ablations or ("custom" if "=" in request.space[0] else request.space[0])
    return f"{what}-{time.strftime('%Y%m%d-%H%M%S')}"
