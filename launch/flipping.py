"""Measure semantics flipping: CUT against SRUNIT at three strengths of mismatch, on street scenes with known truth."""

import argparse
import os
from pathlib import Path

from infra.console import setup_logging
from infra.errors import exits_cleanly
from launch.flipping_benchmark import TIERS, Benchmark

DESCRIPTION = """Measure semantics flipping on street scenes, whose true labels and true translations are known.

Trains CUT, SRUNIT with beta = 0 and SRUNIT, alike and with several seeds each, on data whose target has as much
vegetation and sky as the source (none), more and less (middle), much more and much less (strong), and lets a segmenter
trained on the target's look judge them all. Prints mean and spread; docs/flipping.md discusses the results.

Each training is a process of its own (launch/train.py). The same command again continues where it was stopped."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "flipping.py",
        description=DESCRIPTION,
        epilog="example: python launch/flipping.py --seeds 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = result.add_argument
    option("--tier", choices=TIERS, default="small", help="small: two CPU cores; gpu: 256x128 scenes [%(default)s]")
    option("--out", type=Path, metavar="DIR", help="folder of data, runs and results [runs/flipping-TIER]")
    option(
        "--beta", type=float, nargs="+", default=[0.0, 1e-4], metavar="X", help="SRUNIT's weights of L_robust [0 1e-4]"
    )
    option("--seeds", type=int, default=3, metavar="N", help="runs of each method and strength [%(default)s]")
    option("--parallel", type=int, metavar="N", help="trainings at once [small: one per core; gpu: 1]")
    return result


@exits_cleanly
def main() -> None:
    args = parser().parse_args()
    setup_logging(None)
    out = args.out or Path(f"runs/flipping-{args.tier}")
    usual = (os.cpu_count() or 1) if args.tier == "small" else 1
    parallel = usual if args.parallel is None else args.parallel
    benchmark = Benchmark(TIERS[args.tier], out, args.beta, args.seeds, parallel)
    benchmark.run()
    print(benchmark.report())


if __name__ == "__main__":
    main()
