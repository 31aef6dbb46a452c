"""Measure semantics flipping: arms, which are sets of options, at three strengths of mismatch, on scenes with known truth."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from infra.console import setup_logging
from infra.disk import local_path
from infra.errors import UserError, exits_cleanly
from launch.flipping_arms import choose, read_arms
from launch.flipping_benchmark import TIERS, Benchmark
from launch.flipping_data import BenchmarkData, OwnData, StreetScenes, name_of
from launch.flipping_results import JUDGE, STRENGTHS, differences, read_runs, tables
from trainer.tasks import TASKS

ARMS = ("cut", "best")  # where none are named
SEEDS = (0, 1, 2)

DESCRIPTION = """Measure semantics flipping on street scenes, whose true labels and true translations are known.

Trains each arm with each seed on data whose target has as much vegetation and sky as the source (none), more and less
(middle), much more and much less (strong), all alike but for the arm's options (launch/flipping-arms.yaml), and lets a
segmenter trained on the target's look judge them all. docs/flipping.md discusses the results.

With --data, --task and --judge it does the same on a data root of yours, whose name then stands for the strength.

Each training is a process of its own (launch/train.py). The same command again continues where it was stopped; runs of
other commands that are in FILE stay there. Whatever the trainings need is made where it is missing."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "flipping.py",
        description=DESCRIPTION,
        epilog="example: python launch/flipping.py --arms cut best --mismatch strong --seed-list 0 1 2 3 4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    option = result.add_argument
    option(
        "--arms",
        nargs="+",
        metavar="NAME",
        help=f"among {', '.join(read_arms())} [cut best]",
    )
    option(
        "--mismatch", nargs="+", metavar="STRENGTH",
        help="none, middle or strong [all three]; of --table also the name of data",
    )  # fmt: skip
    option(
        "--data",
        metavar="ROOT",
        help="prepared images with labels of the test sources [street scenes are drawn]",
    )
    option("--task", choices=TASKS, help="of --data [gta2city]")
    option(
        "--judge",
        metavar="RUN",
        help="of --data: run of a segmenter that knows the targets; of --table: its name there",
    )
    option("--seed-list", nargs="+", type=int, metavar="N", help="one run of each arm with each [0 1 2]")
    option("--steps", type=int, metavar="N", help="of each training [those of the tier: 1200 or 5000]")
    option(
        "--json",
        type=local_path,
        metavar="FILE",
        help="list of all runs, to which those of this command are added [OUT/runs.json]",
    )
    option(
        "--out",
        type=local_path,
        metavar="DIR",
        help="folder of data, runs and pictures [runs/flipping-TIER; of --data: runs/flipping-NAME]",
    )
    option("--tier", choices=TIERS, default="small", help="small: two CPU cores; gpu: 256x128 scenes [%(default)s]")
    option("--parallel", type=int, metavar="N", help="trainings at once [small: one per core; gpu: 1]")
    option(
        "--compile",
        action="store_true",
        help="have torch.compile fuse the networks: on a CPU a fifth less time for trainings of 4,000 steps and more [on a "
        "GPU alone]",
    )
    option(
        "--table",
        type=local_path,
        metavar="FILE",
        help="train nothing, and print the tables of such a list of runs in Markdown: those of --arms, --mismatch, --seed-list, "
        "--steps and --judge",
    )
    option("--against", metavar="NAME", help="with --table: how much more each arm flips than this one, seed by seed")
    return result


def _tables(args: argparse.Namespace, titles: Mapping[str, str]) -> str:
    """Of --table. UserError for names that no run of it has, and for options of a training."""
    for name in ("data", "task", "json", "out", "parallel", "compile"):
        if getattr(args, name):
            raise UserError(f"--table trains nothing: leave out --{name}")
    if not args.table.exists():
        raise UserError(f"there is no file {args.table}: name one that launch/flipping.py wrote, such as OUT/runs.json")
    runs = read_runs(args.table)
    arms = args.arms and args.against and [args.against, *args.arms]
    wanted = {
        "arm": arms or args.arms, "mismatch": args.mismatch, "seed": args.seed_list,
        "steps": None if args.steps is None else [args.steps], JUDGE: args.judge and [args.judge],
    }  # fmt: skip
    for key, values in wanted.items():
        there = {run[key]: None for run in runs if key in run}
        for value in values or ():
            if runs and value not in there:
                raise UserError(f"no run of {args.table} has {key} {value}: it has {', '.join(map(str, there))}")
        runs = [run for run in runs if not values or run.get(key) in values]
    return differences(runs, titles, args.against) if args.against else tables(runs, titles)


def _data(args: argparse.Namespace, out: Path) -> BenchmarkData:
    """UserError for options that do not go together."""
    if args.data is None:
        if args.task or args.judge:
            raise UserError("--task and --judge belong to data of yours: give --data ROOT, too")
        for name in args.mismatch or ():
            if name not in STRENGTHS:
                raise UserError(f"--mismatch {name} is no strength: choose among {', '.join(STRENGTHS)}")
        return StreetScenes(TIERS[args.tier], out)
    if args.mismatch:
        raise UserError(
            "--mismatch is a strength of drawn scenes, and --data has one of its own: leave one of them out"
        )
    if args.judge is None:
        raise UserError(
            "--data needs a --judge: train one with 'python launch/train_segmenter.py --data ROOT --run-dir runs/judge'"
        )
    return OwnData(args.data, args.task or "gta2city", Path(args.judge))


@exits_cleanly
def main() -> None:
    args = parser().parse_args()
    setup_logging(None)
    arms = read_arms()
    titles = {name: arm.title for name, arm in arms.items()}
    if args.table:
        print(_tables(args, titles))
        return
    if args.against:
        raise UserError("--against compares the runs of a --table: name that, too")
    out = args.out or Path(f"runs/flipping-{name_of(args.data) if args.data else args.tier}")
    file = args.json or out / "runs.json"
    usual = (os.cpu_count() or 1) if args.tier == "small" else 1
    parallel = usual if args.parallel is None else args.parallel
    data = _data(args, out)
    benchmark = Benchmark(
        TIERS[args.tier],
        data,
        out,
        choose(arms, args.arms or ARMS),
        args.mismatch or data.names,
        args.seed_list or SEEDS,
        args.steps,
        parallel,
        args.compile,
    )
    benchmark.run(file)
    print(tables([run for run in read_runs(file) if run["steps"] == benchmark.steps], titles))
    print(f"written: {file}, {benchmark.write_pictures()}")


if __name__ == "__main__":
    main()
