"""The training step of any method, for each combination of precision, layout, compilation, batch and taps, against one in
the shape of the published code.

Every combination trains in a process of its own, on decoded images of a real loader, one combination after the other; each
takes its repetitions in turn with the published step of the same taps, whose process stays. Steps before the first
repetition are not counted (a compiled one has met every shape by then).

Figures, COMBINATION/… by their keys in the JSON. COMBINATION is published/TAPS or PRECISION/LAYOUT/COMPILE/bBATCH/TAPS,
with METHOD in place of TAPS where that is not SRUNIT.

seconds            s per step
pairs_per_s        pairs of images per second
to_published       ratio of these to those of published/TAPS right before
cpu_seconds        s of all cores per step: with one thread, other programs on the machine change it little
cpu_to_published   to_published in these
tflops             10^12 FLOPs a second, as torch counts those of a step
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.storage import LocalStorage
from launch.benchmarks import measuring
from launch.benchmarks.measuring import Figure, Target, pick_device, ratios
from launch.benchmarks.profiling import KINDS
from launch.benchmarks.stepping import OutOfMemory, Stepper
from launch.runs.config import make_config
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import street_scenes
from trainer.methods import METHODS

HELP = "the training step, by precision, layout, compilation, batch and taps, against the published code's"

# Side of the crops in pixels, and the sizes of the networks.
SIZES: dict[str, dict[str, Any]] = {
    "full": {"data.crop": 256},
    "small": {"data.crop": 64, "methods.srunit.patches": 64, "methods.srunit.head_dim": 32,
              "methods.srunit.generator.ngf": 8, "methods.srunit.discriminator.ndf": 8},
}  # fmt: skip
TAPS: dict[str, dict[str, Any]] = {
    "none": {"method.robust.beta": 0.0},
    "one": {"method.robust.per_step": "one", "method.robust.start": 0.0},
    "all": {"method.robust.per_step": "all", "method.robust.start": 0.0},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"precision": ["fp32", "bf16"], "layout": ["contiguous", "channels_last"], "compile": ["eager"],
            "batch": [1], "taps": ["all"], "steps": 1},
    "cuda": {"precision": ["fp32", "bf16"], "layout": ["channels_last"], "compile": ["eager", "compile", "graphs"],
             "batch": [1, 16], "taps": ["one", "all"], "steps": 20},
}  # fmt: skip
SCENES = 8  # of each domain
FIRST = 1000  # number of the first step that counts
WARM_UP = {"eager": 1, "compile": 25, "graphs": 25}  # enough for one random tap a step to have met all five twice

# What the best combination is to reach at full size: name, quantity, what is said of it, part of the combination's name,
# the least.
Goal = tuple[str, str, str, Callable[[str], bool], float]
GOALS: dict[str, list[Goal]] = {
    "cpu": [
        ("fp32", "to_published", "fp32 / published", lambda name: name.startswith("fp32") and name.endswith("all"), 1.15),
        ("bf16", "to_published", "bf16 / published", lambda name: name.startswith("bf16") and name.endswith("all"), 1.8),
    ],
    "cuda": [
        ("batch_1", "to_published", "one pair a step / published", lambda name: "/b1/" in name, 4),
        ("any_batch", "to_published", "any batch / published", lambda name: True, 10),
        ("pairs_per_s", "pairs_per_s", "SRUNIT, one tap", lambda name: name.endswith("one"), 136),
        ("matmul_share_one", "matmul_share", "share of matmul, one tap", lambda name: name.endswith("one"), 0.4),
        ("matmul_share_all", "matmul_share", "share of matmul, all taps", lambda name: name.endswith("all"), 0.4),
    ],
}  # fmt: skip
COLUMNS = {
    "seconds": "s/step", "pairs_per_s": "pairs/s", "to_published": "x published",
    "cpu_seconds": "CPU s", "cpu_to_published": "x in CPU s", "tflops": "TFLOP/s",
    "matmul_share": "of matmul", "peak": "GiB",
    **{f"share_{kind}": kind for kind in KINDS}, "share_waiting": "waiting",
}  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Combination:
    """One row of the table. program: "ours" or "published". The others: as on the command line."""

    program: str
    precision: str
    layout: str
    compile: str
    batch: int
    taps: str
    method: str = "srunit"

    @classmethod
    def published(cls, taps: str) -> "Combination":
        return cls("published", "fp32", "contiguous", "eager", 1, taps)

    @property
    def name(self) -> str:
        last = self.taps if self.method == "srunit" else self.method
        if self.program == "published":
            return f"published/{last}"
        return f"{self.precision}/{self.layout}/{self.compile}/b{self.batch}/{last}"

    def options(self, size: str, device: str, data: str, given: Mapping[str, str]) -> dict[str, Any]:
        """A flat layer of the configuration tree. given: more options, by their dotted names."""
        taps = TAPS[self.taps] if self.method == "srunit" else {}
        return {
            **SIZES[size], **taps, "method.name": self.method, "data.root": data,
            "engine.device": device, "engine.kind": "single", "engine.precision": self.precision,
            "engine.memory_format": self.layout, "engine.compile": self.compile != "eager",
            "engine.graphs": self.compile == "graphs", "optim.global_batch": self.batch, **given,
        }  # fmt: skip


def add_options(command: argparse.ArgumentParser) -> None:
    command.set_defaults(repetitions=3)
    option = command.add_argument
    option("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train [%(default)s]")
    option("--method", nargs="+", choices=METHODS, default=["srunit"], help="[srunit]")
    option("--size", choices=SIZES, default="full", help="full: 256x256, ngf 64; small: 64x64, ngf 8 [%(default)s]")
    option("--precision", nargs="+", choices=("fp32", "bf16", "fp16"), help=_by_device("precision"))
    option("--layout", nargs="+", choices=("contiguous", "channels_last"), help=_by_device("layout"))
    option(
        "--compile", nargs="+", choices=("eager", "compile", "graphs"),
        help="graphs: compiled, and replayed as CUDA graphs; " + _by_device("compile"),
    )  # fmt: skip
    option("--batch", nargs="+", type=int, metavar="N", help="pairs a step; " + _by_device("batch"))
    option("--taps", nargs="+", choices=TAPS, help="SRUNIT's, perturbed in a step (none: CUT); " + _by_device("taps"))
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
    device = pick_device(args.device).type
    chosen = {name: getattr(args, name) or value for name, value in DEFAULTS[device].items()}
    axes = [chosen[name] for name in ("precision", "layout", "compile", "batch")]
    given = named_values(args.set)
    figures: list[Figure] = []
    with scenes(args.data, args.size) as data:

        def start(stack: ExitStack, combination: Combination) -> "Running":
            options = combination.options(args.size, device, data, given)
            make_config(options)  # whose mistakes are this process's to tell
            log.info("warming up %s", combination.name)
            stepper = stack.enter_context(Stepper(combination.name, combination.program, options))
            stepper.ask("steps", first=0, count=WARM_UP[combination.compile] if device == "cpu" else 25)
            return Running(combination, stepper, chosen["steps"])

        for taps in chosen["taps"]:
            with ExitStack() as all_along:
                baseline = start(all_along, Combination.published(taps))
                for method, precision, layout, compile, batch in itertools.product(args.method, *axes):
                    ours = Combination("ours", precision, layout, compile, batch, taps, method)
                    try:
                        with ExitStack() as meanwhile:
                            figures += _in_turn(start(meanwhile, ours), baseline, args.repetitions)
                    except OutOfMemory:
                        log.warning("%s does not fit in the memory of the GPU and is left out", ours.name)
                figures += baseline.figures(baseline.answers)
    return figures + (goals_of(figures, device) if args.size == "full" else [])


@dataclass
class Running:
    """A combination's process, and its answers so far, one for each repetition of so many steps."""

    combination: Combination
    stepper: Stepper
    steps: int
    answers: list[dict[str, float]] = field(default_factory=list)

    def repeat(self, repetition: int) -> None:
        """The same repetition of any combination draws the same taps."""
        answer = self.stepper.ask("steps", first=FIRST + repetition * self.steps, count=self.steps)
        log.info("  %s %.3g s", self.combination.name, answer["seconds"] / self.steps)
        self.answers.append(answer)

    def figures(self, baseline: Sequence[Mapping[str, float]]) -> list[Figure]:
        """Figures of all repetitions and of one profiled step. baseline: the published step's answers beside ours."""
        log.info("profiling %s", self.combination.name)
        shares = self.stepper.ask("profile", first=FIRST)
        return figures_of(self.combination, self.steps, self.answers, shares.pop("flops"), shares, baseline)


def _in_turn(ours: Running, baseline: Running, repetitions: int) -> list[Figure]:
    """What disturbs the machine hits both alike."""
    for repetition in range(repetitions):
        baseline.repeat(repetition)
        ours.repeat(repetition)
    return ours.figures(baseline.answers[-repetitions:])


def figures_of(
    combination: Combination,
    steps: int,
    answers: Sequence[Mapping[str, float]],
    flops: float,
    shares: Mapping[str, float],
    baseline: Sequence[Mapping[str, float]],
) -> list[Figure]:
    """answers, baseline: of `Training.steps`, ours and the published step's, for each repetition of so many steps.
    flops, shares: of a step, and of its time."""
    rates = tuple(steps * combination.batch / answer["seconds"] for answer in answers)
    achieved = tuple(flops * steps / answer["seconds"] / 1e12 for answer in answers)
    matmul = tuple(answer["matmul"] for answer in answers)
    cpu_rates = [steps * combination.batch / answer["cpu_seconds"] for answer in answers]

    def figure(name: str, unit: str, *values: float) -> Figure:
        return Figure(f"{combination.name}/{name}", f"{combination.name}: {name}", unit, values)

    return [
        figure("seconds", "s", *(answer["seconds"] / steps for answer in answers)),
        figure("pairs_per_s", "pairs/s", *rates),
        figure("to_published", "", *ratios(rates, [steps / answer["seconds"] for answer in baseline])),
        figure("cpu_seconds", "s", *(answer["cpu_seconds"] / steps for answer in answers)),
        figure("cpu_to_published", "", *ratios(cpu_rates, [steps / answer["cpu_seconds"] for answer in baseline])),
        figure("tflops", "TFLOP/s", *achieved),
        figure("matmul", "TFLOP/s", *matmul),
        figure("matmul_share", "", *ratios(achieved, matmul)),
        figure("peak", "GiB", answers[0]["peak"] / 2**30),
        *(figure(f"share_{kind}", "", share) for kind, share in shares.items()),
        figure("share_waiting", "", *(answer["waiting"] / answer["seconds"] for answer in answers)),
    ]


def goals_of(figures: Sequence[Figure], device: str) -> list[Figure]:
    """The best median among our combinations that each goal speaks of, where there is one."""
    goals = []
    for goal, quantity, says, speaks_of, least in GOALS[device]:
        names = {
            figure: figure.name.removesuffix("/" + quantity)
            for figure in figures
            if figure.name.endswith("/" + quantity)
        }
        found = [figure for figure, name in names.items() if not name.startswith("published") and speaks_of(name)]
        if found:
            best = max(found, key=lambda figure: figure.median)
            goals.append(
                Figure(f"best/{goal}", f"{says} ({names[best]})", best.unit, best.values, Target("at least", least))
            )
    return goals


def table(figures: Sequence[Figure]) -> str:
    """A row for each combination, then the goals."""
    goals = [figure for figure in figures if figure.name.startswith("best/")]
    text = measuring.grid([figure for figure in figures if figure not in goals], COLUMNS)
    return f"{text}\n\n{measuring.table(goals)}" if goals else text


def named_values(given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE texts as a flat layer. UserError for one without a value."""
    for text in given:
        if "=" not in text:
            raise UserError(f"--set {text} gives no value: write NAME=VALUE, such as method.generator.blocks=6")
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
