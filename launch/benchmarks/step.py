"""The training step, for each combination of precision, layout, compilation, batch and taps, against one in the shape of
the published code.

Every combination trains in a process of its own, on decoded images of a real loader, one combination after the other; each
takes its repetitions in turn with the published step of the same taps, whose process stays. Steps before the first
repetition are not counted (a compiled one has met every shape by then).

Figures, COMBINATION/… by their keys in the JSON. COMBINATION is published/TAPS or PRECISION/LAYOUT/COMPILE/bBATCH/TAPS.

seconds            s per step
pairs_per_s        pairs of images per second
to_published       ratio of these to those of published/TAPS right before
cpu_seconds        s of all cores per step and process: with one thread, other programs on the machine change it little
cpu_to_published   to_published in these
tflops             10^12 FLOPs a second, of the work counted by `launch.benchmarks.work.step_flops`
matmul             the same of a large matrix product in this precision, right after the steps (what the device can do)
matmul_share       tflops / matmul
peak               GiB: largest resident memory of the process (largest memory allocated, on a GPU)
share_KIND         of the time of one profiled step, KINDS of `launch.benchmarks.profiling`
share_waiting      of the time of the steps, waiting for data
best/GOAL          the best of these at full size, with a target
"""

import argparse
import itertools
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infra.errors import UserError
from infra.storage import LocalStorage
from launch.benchmarks.measuring import Figure
from launch.benchmarks.step_report import Combination, figures_of, goals_of, table
from launch.benchmarks.steppers import OutOfMemory, Stepper
from launch.config import JobConfig, make_config
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import street_scenes
from trainer.draws import Draws

__all__ = ["HELP", "add_options", "run", "table"]

HELP = "the training step, by precision, layout, compilation, batch and taps, against the published code's"

# Side of the crops in pixels, and the sizes of the networks.
SIZES: dict[str, dict[str, Any]] = {
    "full": {"data.crop": 256},
    "small": {"data.crop": 64, "model.ngf": 8, "model.ndf": 8, "model.head_dim": 32, "method.patches": 64},
}
TAPS: dict[str, dict[str, Any]] = {
    "none": {"method.robust.beta": 0.0},
    "one": {"method.robust.per_step": "one"},
    "all": {"method.robust.per_step": "all"},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"precision": ["fp32", "bf16"], "layout": ["contiguous", "channels_last"], "compile": ["eager"],
            "batch": [1], "taps": ["all"], "steps": 1},
    "cuda": {"precision": ["fp32", "bf16"], "layout": ["channels_last"], "compile": ["eager", "compile", "graphs"],
             "batch": [1, 16], "taps": ["one", "all"], "steps": 20},
}  # fmt: skip
SCENES = 8  # of each domain
FIRST = 1000  # number of the first step that counts

log = logging.getLogger(__name__)


def add_options(command: argparse.ArgumentParser) -> None:
    command.set_defaults(repetitions=3)
    option = command.add_argument
    option("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train [%(default)s]")
    option("--size", choices=SIZES, default="full", help="full: 256x256, ngf 64; small: 64x64, ngf 8 [%(default)s]")
    option("--precision", nargs="+", choices=("fp32", "bf16", "fp16"), help=_by_device("precision"))
    option("--layout", nargs="+", choices=("contiguous", "channels_last"), help=_by_device("layout"))
    option(
        "--compile",
        nargs="+",
        choices=("eager", "compile", "graphs"),
        help="graphs: compiled, and replayed as CUDA graphs; " + _by_device("compile"),
    )
    option("--batch", nargs="+", type=int, metavar="N", help="pairs a step; " + _by_device("batch"))
    option("--taps", nargs="+", choices=TAPS, help="perturbed in a step (none: CUT); " + _by_device("taps"))
    option("--steps", type=int, metavar="N", help="in one repetition; " + _by_device("steps"))
    option("--set", nargs="+", default=[], metavar="NAME=VALUE", help="any options of launch/train.py")
    option("--data", metavar="ROOT", help="prepared images [a few street scenes, drawn at the start]")


def _by_device(name: str) -> str:
    def shown(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    cpu, cuda = (shown(DEFAULTS[device][name]) for device in ("cpu", "cuda"))
    return f"[{cpu}]" if cpu == cuda else f"[on a CPU {cpu}, on a GPU {cuda}]"


def run(args: argparse.Namespace) -> list[Figure]:
    """Measure the combinations asked for, and the published step for each choice of taps. UserError for impossible
    ones. One that does not fit in a GPU's memory is left out, with a line that says so."""
    device = pick_device(args.device)
    chosen = {name: getattr(args, name) or value for name, value in DEFAULTS[device].items()}
    axes = [chosen[name] for name in ("precision", "layout", "compile", "batch")]
    given = named_values(args.set)
    figures: list[Figure] = []
    with scenes(args.data, args.size) as data:

        def start(stack: ExitStack, combination: Combination) -> Running:
            options = options_of(combination, args.size, device, data, given)
            config = make_config(options)
            log.info("warming up %s", combination.name)
            stepper = stack.enter_context(Stepper(combination.name, combination.program, options))
            stepper.ask(do="steps", first=0, count=_warm_up(combination, config, device))
            return Running(combination, stepper, config, chosen["steps"], [])

        for taps in chosen["taps"]:
            with ExitStack() as all_along:
                baseline = start(all_along, Combination.published(taps))
                for precision, layout, compile, batch in itertools.product(*axes):
                    ours = Combination("ours", precision, layout, compile, batch, taps)
                    try:
                        with ExitStack() as meanwhile:
                            figures += _in_turn(start(meanwhile, ours), baseline, args.repetitions)
                    except OutOfMemory:
                        log.warning("%s does not fit in the memory of the GPU and is left out", ours.name)
                figures += baseline.figures(baseline.answers)
    return figures + (goals_of(figures, device) if args.size == "full" else [])


@dataclass(frozen=True)
class Running:
    """A combination's process, and its answers so far, one for each repetition of so many steps."""

    combination: Combination
    stepper: Stepper
    config: JobConfig
    steps: int
    answers: list[dict[str, float]]

    def repeat(self, repetition: int) -> None:
        """The same repetition of any combination draws the same taps."""
        answer = self.stepper.ask(do="steps", first=FIRST + repetition * self.steps, count=self.steps)
        log.info("  %s %.3g s", self.combination.name, answer["seconds"] / self.steps)
        self.answers.append(answer)

    def figures(self, baseline: Sequence[Mapping[str, float]]) -> list[Figure]:
        """Figures of all repetitions and of one profiled step. baseline: the published step's answers beside ours."""
        log.info("profiling %s", self.combination.name)
        shares = self.stepper.ask(do="profile", first=FIRST)
        return figures_of(self.combination, self.config, self.steps, self.answers, shares, baseline)


def _in_turn(ours: Running, baseline: Running, repetitions: int) -> list[Figure]:
    """What disturbs the machine hits both alike."""
    for repetition in range(repetitions):
        baseline.repeat(repetition)
        ours.repeat(repetition)
    return ours.figures(baseline.answers[-repetitions:])


def options_of(combination: Combination, size: str, device: str, data: str, given: Mapping[str, str]) -> dict[str, Any]:
    """A flat layer of the configuration tree. given: more options, by their dotted names."""
    return {
        **SIZES[size], **TAPS[combination.taps], "method.robust.start": 0.0, "data.root": data,
        "engine.device": device, "engine.kind": "single", "engine.precision": combination.precision,
        "engine.memory_format": combination.layout, "engine.compile": combination.compile != "eager",
        "engine.graphs": combination.compile == "graphs", "optim.global_batch": combination.batch, **given,
    }  # fmt: skip


def pick_device(wanted: str) -> str:
    """cpu or cuda. UserError if there is no GPU and one was asked for."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs an NVIDIA GPU and none is to be seen: use auto or cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def named_values(given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE texts as a flat layer. UserError for one without a value."""
    for text in given:
        if "=" not in text:
            raise UserError(f"--set {text} gives no value: write NAME=VALUE, such as model.blocks=6")
    return dict(text.split("=", 1) for text in given)


@contextmanager
def scenes(root: str | None, size: str) -> Iterator[str]:
    """The data root named, or street scenes that crops of this size fit in, drawn into a folder that goes again."""
    if root:
        yield root
        return
    side = SIZES[size]["data.crop"]
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        prepare(
            street_scenes(SCENES, test_count=0), LocalStorage(Path(folder)), Encoding((2 * side, side)), progress=False
        )
        yield folder


def _warm_up(combination: Combination, config: JobConfig, device: str) -> int:
    """How many steps do not count: one, or where code is chosen or compiled for each shape, enough to meet all shapes
    twice; the tap of a step decides them."""
    if device == "cpu" and combination.compile == "eager":
        return 1
    if combination.taps != "one":
        return 3
    taps = len(config.method.robust_taps)
    drawn: Counter[int] = Counter()
    while len(drawn) < taps or min(drawn.values()) < 2:
        drawn[Draws(0, drawn.total()).choice("robust", taps)] += 1
    return drawn.total()
