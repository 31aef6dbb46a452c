"""Adapt segmenters to a domain without labels: train them on translated sources, and score them on real target images."""

import argparse
import os
from pathlib import Path

from infra.config import read_yaml
from infra.console import setup_logging
from infra.disk import local_path
from infra.errors import UserError, exits_cleanly
from launch.adaptation import STRENGTH, Adaptation, street_root
from launch.adaptation_results import read, tables
from launch.flipping_arms import choose, read_arms
from launch.flipping_benchmark import TIERS, Benchmark
from launch.flipping_data import StreetScenes

DESCRIPTION = """Measure what translations are worth to a segmenter of the target domain, whose own labels it is not given.

Trains segmenters with one schedule: on the sources as they are and as each translator makes them, both with the sources' labels,
and on the targets with their own labels (the ceiling). Scores all on the target's labelled test images. docs/adaptation.md has
the method and results.

Without --data: street scenes and the translators of launch/flipping.py, in --benchmark, where missing ones are trained. Each
training is a process of its own. The same command again continues where it was stopped; runs of other commands in OUT stay."""

EXAMPLES = """examples:
  python launch/adapt.py --arms cut best --seed-list 0 1 2
  python launch/adapt.py --data data/gta2city --translators cut=runs/cut srunit=runs/srunit-{seed} --seed-list 0 1"""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "adapt.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    option = result.add_argument
    option(
        "--data", metavar="ROOT", help="prepared data whose sources and target test images have labels [street scenes]"
    )
    option(
        "--translators", nargs="+", default=[], metavar="NAME=RUN",
        help="with --data: runs of launch/train.py, or checkpoints; {seed} in RUN stands for the seed",
    )  # fmt: skip
    option(
        "--arms", nargs="+", metavar="NAME",
        help="without --data: arms of launch/flipping.py [cut best srunit cyclegan semst]",
    )  # fmt: skip
    option("--tier", choices=TIERS, default="small", help="without --data, as of launch/flipping.py [%(default)s]")
    option(
        "--benchmark",
        type=local_path,
        metavar="DIR",
        help="without --data: OUT of launch/flipping.py [runs/flipping-TIER]",
    )
    option("--seed-list", nargs="+", type=int, default=[0], metavar="N", help="one segmenter of each arm with each [0]")
    option(
        "--segmenter-config", type=local_path, metavar="FILE",
        help="YAML file of options of launch/train_segmenter.py for all [the network's recipe; without --data the tier's]",
    )  # fmt: skip
    option(
        "--out",
        type=local_path,
        metavar="DIR",
        help="folder of data, runs and pictures [runs/adaptation; without --data: runs/adaptation-TIER]",
    )
    option("--parallel", type=int, metavar="N", help="trainings at once [small tier: one per core; else: 1]")
    option("--table", type=local_path, metavar="FILE", help="train nothing, and print the tables of an adaptation.json")
    return result


def translators(given: list[str]) -> dict[str, str]:
    """NAME=RUN by name."""
    for text in given:
        if not all(text.partition("=")):
            raise UserError(f"--translators {text} is no NAME=RUN: give such as cut=runs/cut")
    named = [text.split("=", 1) for text in given]
    if len({name for name, _ in named}) < len(named):
        raise UserError(f"--translators {' '.join(given)} name one twice: name each once")
    return {name: run for name, run in named}


def on_streets(args: argparse.Namespace, out: Path, parallel: int) -> Adaptation:
    """On the embedded scenes, once their translators are trained."""
    tier = TIERS[args.tier]
    arms = choose(read_arms(), args.arms or ["cut", "best", "srunit", "cyclegan", "semst"])
    folder = args.benchmark or Path(f"runs/flipping-{args.tier}")
    data = StreetScenes(tier, folder)
    benchmark = Benchmark(tier, data, folder, arms, [STRENGTH], args.seed_list, None, parallel)
    benchmark.run(folder / "runs.json")
    of_arms = {arm.name: benchmark.runs_of(arm, STRENGTH) for arm in arms}
    options = {**tier.segmenter, **_file(args)}
    return Adaptation(street_root(benchmark, out), of_arms, options, out, args.seed_list, parallel)


def _file(args: argparse.Namespace) -> dict[str, object]:
    return read_yaml(args.segmenter_config) if args.segmenter_config else {}


@exits_cleanly
def main() -> None:
    args = parser().parse_args()
    setup_logging(None)
    titles = {name: arm.title for name, arm in read_arms().items()} if args.data is None else {}
    if args.table:
        print(tables(read(args.table), titles))
        return
    if args.data is None and args.translators:
        raise UserError("--translators are of data of yours: add --data, or name --arms")
    if args.data is not None and (args.arms or args.benchmark):
        raise UserError("--arms and --benchmark are of the street scenes: name --translators, or leave out --data")
    small = args.data is None and args.tier == "small"
    parallel = args.parallel if args.parallel is not None else (os.cpu_count() or 1) if small else 1
    if args.data is None:
        adaptation = on_streets(args, args.out or Path(f"runs/adaptation-{args.tier}"), parallel)
    else:
        adaptation = Adaptation(
            args.data,
            translators(args.translators),
            _file(args),
            args.out or Path("runs/adaptation"),
            args.seed_list,
            parallel,
        )
    adaptation.run()
    print(tables(read(adaptation.file), titles))
    print("written: " + ", ".join(map(str, (adaptation.file, *adaptation.write_pictures(titles)))))


if __name__ == "__main__":
    main()
