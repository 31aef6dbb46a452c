"""Measure how fast the parts of the system are on this machine."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from infra.config import flatten
from infra.console import setup_logging
from infra.disk import local_path
from infra.errors import UserError, exits_cleanly
from launch.benchmarks import data, decode, gpu, ops, rates, scaling, serving, step, translate
from launch.benchmarks.measuring import table, write_report
from launch.runs.config import parse_arguments
from pipelines.images import parse_size

# Each module has HELP and run(config, repetitions, steps) -> metrics.
BENCHMARKS: dict[str, ModuleType] = {
    "step": step, "data": data, "ops": ops, "translate": translate, "rates": rates, "decode": decode
}  # fmt: skip

DESCRIPTION = """Measure how fast the parts of the system are. step, data, ops, translate, rates and decode take every option of
launch/train.py beside their own and measure the job that these describe. All is repeated, and what is compared takes turns; the
table shows medians with the least and the most.

JSON: benchmark, options, machine {system, cpu, cores, gpus}, versions {package: version}, and metrics {name: {unit,
median, least, most, values}}; the module in launch/benchmarks/ lists the names."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        "bench.py",
        description=DESCRIPTION,
        epilog="example: python launch/bench.py step --method srunit --precision bf16 --json step.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.HELP, description=benchmark.HELP, allow_abbrev=False,
                                      epilog="and all options of launch/train.py")  # fmt: skip
        command.add_argument("--repetitions", type=int, default=5, metavar="N", help="of each measure [%(default)s]")
        command.add_argument("--steps", type=int, metavar="N", help="in one repetition [the benchmark's own]")
        command.add_argument("--json", type=local_path, metavar="FILE", help="write the metrics here, too")
    command = commands.add_parser("scaling", help=scaling.HELP, description=scaling.HELP)
    command.add_argument(
        "runs", nargs="+", type=local_path, metavar="RUN", help="run folders; the first is compared with"
    )
    command = commands.add_parser("serving", help=serving.HELP, description=serving.HELP)
    load = serving.Load()
    command.add_argument("model", type=local_path, metavar="RUN_OR_CHECKPOINT", help="runs/NAME, or a checkpoint in it")
    command.add_argument(
        "--clients", type=int, nargs="+", default=load.clients, metavar="N", help="that ask at once [1 8 32]"
    )
    command.add_argument(
        "--requests", type=int, default=load.requests, metavar="N", help="in a repetition [%(default)s]"
    )
    command.add_argument("--soak", type=int, default=load.soak, metavar="N", help="requests of the soak [%(default)s]")
    command.add_argument("--size", default="256x128", metavar="WxH", help="of the image [%(default)s]")
    command.add_argument("--repetitions", type=int, default=3, metavar="N", help="of each measure [%(default)s]")
    command.add_argument("--json", type=local_path, metavar="FILE", help="write the metrics here, too")
    command = commands.add_parser("gpu", help=gpu.HELP, description=gpu.HELP, allow_abbrev=False)
    command.add_argument(
        "--out", type=local_path, default=Path("runs/gpu"), metavar="DIR", help="of all that is found [%(default)s]"
    )
    command.add_argument("--minutes", type=float, default=25.0, metavar="N", help="for all together [%(default)s]")
    command.add_argument(
        "--toy", action="store_true", help="the same at the smallest size on a CPU, to try the command"
    )
    command.add_argument("--only", nargs="+", default=(), metavar="NAME", help="measures, by the start of their names")
    command.add_argument(
        "--table", type=local_path, metavar="FILE", help="measure nothing; print the tables of such a results.json"
    )
    command.add_argument(
        "--wheels", action="store_true", help="measure nothing; list what such a machine has to install"
    )
    return top


def measure(arguments: Sequence[str]) -> str:
    """What a command line asks for, as a table; empty on all ranks but the first."""
    args, options = parser().parse_known_args(arguments)
    if args.benchmark in ("scaling", "serving", "gpu") and options:
        raise UserError(f"{args.benchmark} has no option {options[0]}: see --help")
    if args.benchmark == "scaling":
        return scaling.report(args.runs)
    if args.benchmark == "gpu":
        return _gpu(args)
    if args.repetitions < 1 or (getattr(args, "steps", None) is not None and args.steps < 1):
        raise UserError("--repetitions and --steps measure nothing below 1: give at least 1")
    if args.benchmark == "serving":
        return _serving(args)
    config = parse_arguments(options)
    metrics = BENCHMARKS[args.benchmark].run(config, args.repetitions, args.steps)
    if metrics and args.json:
        write_report(args.json, args.benchmark, flatten(config), metrics)
    return table(metrics) if metrics else ""


def _gpu(args: argparse.Namespace) -> str:
    if args.wheels:
        return gpu.wheels()
    if args.table:
        return gpu.table(gpu.read_results(args.table))
    file = gpu.run(args.out, args.minutes, toy=args.toy, only=args.only)
    return f"{gpu.table(gpu.read_results(file))}\nwritten: {file}, {file.with_suffix('.md')}"


def _serving(args: argparse.Namespace) -> str:
    load = serving.Load(tuple(args.clients), args.requests, args.soak, parse_size(args.size))
    metrics = serving.run(args.model, load, args.repetitions)
    if args.json:
        write_report(args.json, args.benchmark, {"model": str(args.model), **dataclasses.asdict(load)}, metrics)
    return table(metrics)


@exits_cleanly
def main() -> None:
    setup_logging(None, int(os.environ.get("RANK", 0)))
    if text := measure(sys.argv[1:]):
        print(text)


if __name__ == "__main__":
    main()
