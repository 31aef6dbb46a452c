"""Weak scaling: pairs per second of N ranks, each with the batch that one has alone, on one machine.

All are ordinary trainings by launch/train.py, whose metrics.jsonl has the rates; on a CPU every rank has one thread. Three
things take their repetitions in turn: one rank alone; N processes that train at once and know nothing of each other; N
ranks of one training. The second against the first says what sharing the machine costs (memory, caches), the third against
the second what communication costs.

Figures by their keys in the JSON:

N/alone                pairs/s of one rank
N/apart, N/together    pairs/s of N unconnected processes, of N ranks
N/speed_up             together / alone, target at least 0.9 N
N/shared_machine       apart / (N alone)
N/communication        together / apart
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from infra.errors import UserError
from launch.benchmarks.measuring import Figure, Target, cores, interleaved, pick_device, ratios
from launch.benchmarks.step import SIZES, TAPS, Combination, named_values, scenes
from trainer.engines import EngineConfig

HELP = "pairs per second of several ranks, against one alone and against as many that do not communicate"
WARM_UP = 3
EFFICIENCY = 0.9
TRAIN = Path(__file__).parents[1] / "train.py"


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
    option("--steps", type=int, metavar="N", help="in one repetition [on a CPU 2, on a GPU 50]")
    option("--set", nargs="+", default=[], metavar="NAME=VALUE", help="any options of launch/train.py")
    option("--data", metavar="ROOT", help="prepared images [a few street scenes, drawn at the start]")


def run(args: argparse.Namespace) -> list[Figure]:
    """Measure each number of ranks. UserError for more ranks than there are cores or GPUs."""
    device = pick_device(args.device).type
    places = torch.cuda.device_count() if device == "cuda" else cores()
    numbers = args.ranks or [n for n in (2, 4, 8) if n <= places]
    if not numbers or not 2 <= min(numbers) <= max(numbers) <= places:
        raise UserError(f"scaling needs 2 ranks or more and a core or GPU for each, of which there are {places}: "
                        "give --ranks in between, or another machine")  # fmt: skip
    with scenes(args.data, args.size) as data, tempfile.TemporaryDirectory(prefix="bench-scaling-") as work:
        trainings = Trainings(args, device, data, Path(work))
        figures: list[Figure] = []
        for ranks in numbers:
            groups = {"alone": [1], "apart": [1] * ranks, "together": [ranks]}
            measures = [partial(trainings.rate, name, members) for name, members in groups.items()]
            figures += figures_of(ranks, interleaved(measures, args.repetitions))
        return figures


class Trainings:
    def __init__(self, args: argparse.Namespace, device: str, data: str, work: Path) -> None:
        self.args, self.device, self.data, self.work = args, device, data, work
        self.steps = args.steps or (50 if device == "cuda" else 2)
        self.count = 0

    def rate(self, name: str, members: Sequence[int]) -> dict[str, float]:
        """{name: pairs/s} of trainings of so many ranks each, all at once."""
        folders = []
        jobs = []
        for place, ranks in enumerate(members):
            self.count += 1
            folders.append(self.work / str(self.count))
            jobs.append(self._start(ranks, place, folders[-1]))
        for job in jobs:
            output, _ = job.communicate()
            if job.returncode:
                raise UserError(f"a training of the benchmark failed: {output.strip().splitlines()[-1]}")
        return {name: sum(rate_of(folder / "metrics.jsonl") for folder in folders)}

    def _start(self, ranks: int, place: int, folder: Path) -> subprocess.Popen[str]:
        """place: the GPU of a training of one rank."""
        args = self.args
        row = Combination("ours", args.precision, EngineConfig().memory_format, "eager", ranks * args.batch, args.taps)
        options = row.options(args.size, self.device, self.data, {"data.threads": "1", **named_values(args.set)})
        options |= {
            "engine.kind": args.engine if ranks > 1 else "single", "run_dir": str(folder), "loop.keep_logged": 0,
            "loop.max_steps": WARM_UP + self.steps, "loop.report_every": WARM_UP, "loop.samples": 1,
        }  # fmt: skip
        file = folder.with_suffix(".yaml")
        file.write_text(json.dumps(options))  # which is YAML, too
        binaries = Path(sys.executable).parent
        launch = {"ddp": [str(binaries / "torchrun"), "--standalone", "--nproc_per_node", str(ranks)],
                  "deepspeed": [str(binaries / "deepspeed"), "--num_accelerators", str(ranks)]}  # fmt: skip
        command = launch[args.engine] if ranks > 1 else [sys.executable]
        environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{self.work / 'mlflow.db'}"}
        if self.device == "cpu":
            environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        elif ranks == 1:
            environment |= {"CUDA_VISIBLE_DEVICES": str(place)}
        return subprocess.Popen(
            [*command, str(TRAIN), "--config", str(file)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip


def rate_of(metrics: Path) -> float:
    """Pairs/s in the median step after the warm-up."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return statistics.median(row["pairs_per_s"] for row in rows[WARM_UP:])


def figures_of(ranks: int, rates: Mapping[str, Sequence[float]]) -> list[Figure]:
    """rates: pairs/s of each repetition, of one rank alone and of so many apart and together."""
    alone, apart, together = (tuple(rates[name]) for name in ("alone", "apart", "together"))
    machine = tuple(one / ranks for one in ratios(apart, alone))
    target = Target("at least", EFFICIENCY * ranks)
    return [
        Figure(f"{ranks}/alone", "one rank alone", "pairs/s", alone),
        Figure(f"{ranks}/apart", f"{ranks} that do not communicate", "pairs/s", apart),
        Figure(f"{ranks}/together", f"{ranks} ranks of one training", "pairs/s", together),
        Figure(f"{ranks}/speed_up", "  together / alone", "", ratios(together, alone), target),
        Figure(f"{ranks}/shared_machine", f"  apart / {ranks} alone: the shared machine", "", machine),
        Figure(f"{ranks}/communication", "  together / apart: communication", "", ratios(together, apart)),
    ]
