"""Measure how fast the parts of the system are, against targets and rivals, in one run on one machine."""

import argparse
from pathlib import Path
from types import ModuleType

from infra.console import setup_logging
from infra.errors import UserError, exits_cleanly
from launch.benchmarks import data, ops, scaling, step
from launch.benchmarks.measuring import table, write_report

# Each module has HELP, add_options(command), run(args) -> figures, and its own table(figures) or that of `measuring`.
BENCHMARKS: dict[str, ModuleType] = {"step": step, "data": data, "ops": ops, "scaling": scaling}

DESCRIPTION = """Measure how fast the parts of the system are. Everything is repeated and interleaved with what it is compared
with; the table shows medians with the least and the most, and whether each target is met.

JSON: benchmark, options, machine {system, cpu, cores, gpus}, versions {package: version}, and figures {name: {unit,
median, least, most, values; target and met where there is a target}}; the module in launch/benchmarks/ lists the names."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        "bench.py",
        description=DESCRIPTION,
        epilog="example: python launch/bench.py data --json data-speed.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.HELP, description=benchmark.HELP)
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
        command.add_argument("--repetitions", type=int, default=5, metavar="N", help="of each measure [%(default)s]")
        benchmark.add_options(command)
    return top


@exits_cleanly
def main() -> None:
    args = parser().parse_args()
    setup_logging(None)
    if args.repetitions < 1:
        raise UserError(f"--repetitions is {args.repetitions}: give at least 1")
    figures = BENCHMARKS[args.benchmark].run(args)
    print(getattr(BENCHMARKS[args.benchmark], "table", table)(figures))
    if args.json:
        options = {name: value for name, value in vars(args).items() if name not in ("benchmark", "json")}
        write_report(args.json, args.benchmark, options, figures)


if __name__ == "__main__":
    main()
