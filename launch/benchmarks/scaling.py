"""Weak scaling: pairs per second of N ranks, each with the batch that one has alone, on one machine.

On a CPU every rank has one core. Three things take their repetitions in turn: one rank alone; N processes that train at
once and know nothing of each other; N ranks of one training. The second against the first says what sharing the
machine costs (memory, caches), the third against the second what communication costs.

Figures by their keys in the JSON:

N/alone                pairs/s of one rank
N/apart, N/together    pairs/s of N unconnected processes, of N ranks
N/speed_up             together / alone, target at least 0.9 N
N/shared_machine       apart / (N alone)
N/communication        together / apart
"""

import argparse
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch

from infra.errors import UserError
from launch.benchmarks.measuring import Figure, Target, cores, interleaved, ratios
from launch.benchmarks.step import FIRST, SIZES, TAPS, named_values, options_of, pick_device, scenes
from launch.benchmarks.step_report import Combination
from launch.benchmarks.steppers import Stepper
from launch.config import make_config
from trainer.engines import EngineConfig

HELP = "pairs per second of several ranks, against one alone and against as many that do not communicate"
WARM_UP = 3
EFFICIENCY = 0.9


def add_options(command: argparse.ArgumentParser) -> None:
    command.set_defaults(repetitions=3)
    option = command.add_argument
    option("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train [%(default)s]")
    option("--ranks", nargs="+", type=int, metavar="N", help="[on a CPU 2, on GPUs the powers of 2 up to all]")
    option("--engine", choices=("ddp", "deepspeed"), default="ddp", help="of the ranks [%(default)s]")
    option("--size", choices=SIZES, default="full", help="full: 256x256, ngf 64; small: 64x64, ngf 8 [%(default)s]")
    option("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="[%(default)s]")
    option("--batch", type=int, default=1, metavar="N", help="pairs a step and rank [%(default)s]")
    option("--taps", choices=TAPS, default="none", help="perturbed in a step; none communicates most [%(default)s]")
    option("--steps", type=int, metavar="N", help="in one repetition [on a CPU 1, on a GPU 20]")
    option("--set", nargs="+", default=[], metavar="NAME=VALUE", help="any options of launch/train.py")
    option("--data", metavar="ROOT", help="prepared images [a few street scenes, drawn at the start]")


def run(args: argparse.Namespace) -> list[Figure]:
    """Measure each number of ranks. UserError for more ranks than there are cores or GPUs."""
    device = pick_device(args.device)
    places = torch.cuda.device_count() if device == "cuda" else cores()
    numbers = args.ranks or [n for n in (2, 4, 8) if n <= places]
    if not numbers or not 2 <= min(numbers) <= max(numbers) <= places:
        raise UserError(f"scaling needs 2 ranks or more and a core or GPU for each, of which there are {places}: "
                        "give --ranks in between, or another machine")  # fmt: skip
    with scenes(args.data, args.size) as data, ExitStack() as stack:
        trainings = Trainings(args, device, data, stack)
        lone = [trainings.start([place]) for place in range(max(numbers))]
        figures: list[Figure] = []
        for ranks in numbers:
            groups = {"alone": lone[:1], "apart": lone[:ranks], "together": [trainings.start(range(ranks))]}
            measures = [partial(trainings.rate, name, members) for name, members in groups.items()]
            figures += figures_of(ranks, interleaved(measures, args.repetitions))
        return figures


class Trainings:
    """Processes that take steps when told to, of one rank or of several."""

    def __init__(self, args: argparse.Namespace, device: str, data: str, stack: ExitStack) -> None:
        self.args, self.device, self.data, self.stack = args, device, data, stack
        self.steps = args.steps or (20 if device == "cuda" else 1)

    def start(self, places: Sequence[int]) -> Stepper:
        """One training of a rank on each of these cores or GPUs, warmed up."""
        args, ranks = self.args, len(places)
        row = Combination("ours", args.precision, EngineConfig().memory_format, "eager", ranks * args.batch, args.taps)
        options = options_of(row, args.size, self.device, self.data, {"data.threads": "1", **named_values(args.set)})
        options["engine.kind"] = args.engine if ranks > 1 else "single"
        make_config(options)
        on_cpu = self.device == "cpu"
        stepper = self.stack.enter_context(
            Stepper(
                f"{ranks} ranks", "ours", options,
                cores=[sorted(os.sched_getaffinity(0))[place] if on_cpu else None for place in places],
                environments=[{**each, **({"OMP_NUM_THREADS": "1"} if on_cpu else {})} for each in _ranks(places)],
            )
        )  # fmt: skip
        stepper.ask(do="steps", first=0, count=WARM_UP)
        return stepper

    def rate(self, name: str, members: Sequence[Stepper]) -> dict[str, float]:
        """{name: pairs/s} of these together, all at once."""
        for stepper in members:
            stepper.tell(do="steps", first=FIRST, count=self.steps)
        answers = [stepper.hear() for stepper in members]
        pairs = [self.steps * self.args.batch * len(stepper.processes) for stepper in members]
        return {name: sum(each / answer["seconds"] for each, answer in zip(pairs, answers, strict=True))}


def _ranks(places: Sequence[int]) -> list[dict[str, str]]:
    """The environment that a launcher such as torchrun gives each rank."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    ranks = str(len(places))
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(place)} for rank, place in enumerate(places)]


def figures_of(ranks: int, rates: Mapping[str, Sequence[float]]) -> list[Figure]:
    """rates: pairs/s of each repetition, of one rank alone and of so many apart and together."""
    alone, apart, together = (tuple(rates[name]) for name in ("alone", "apart", "together"))
    machine = tuple(one / ranks for one in ratios(apart, alone))
    return [
        Figure(f"{ranks}/alone", "one rank alone", "pairs/s", alone),
        Figure(f"{ranks}/apart", f"{ranks} that do not communicate", "pairs/s", apart),
        Figure(f"{ranks}/together", f"{ranks} ranks of one training", "pairs/s", together),
        Figure(
            f"{ranks}/speed_up",
            "  together / alone",
            "",
            ratios(together, alone),
            Target("at least", EFFICIENCY * ranks),
        ),
        Figure(f"{ranks}/shared_machine", f"  apart / {ranks} alone: the shared machine", "", machine),
        Figure(f"{ranks}/communication", "  together / apart: communication", "", ratios(together, apart)),
    ]
