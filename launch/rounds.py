"""Train a translator in rounds, with a segmenter that each round makes better: python launch/rounds.py --data ROOT --out DIR."""

import argparse
import sys
from collections.abc import Sequence

from infra.config import OptionParser, flatten, leaves, read_yaml
from infra.console import setup_logging
from infra.disk import local_path
from infra.errors import UserError, exits_cleanly
from launch.runs.config import DEFAULT_METHOD, JobConfig, job_class, make_config, parse_arguments, task_and_method
from launch.runs.embedded import GUIDE
from launch.runs.rounds import WEIGHT, Rounds, table

DESCRIPTION = """Train a translator in rounds, for data whose sources have labels and whose targets need none.

A segmenter S of the sources is trained under random looks. Each round matches target crops to source crops by what S sees,
trains a translator with these and with L_sem (method.semantic) by S, and then trains the next S on the sources as they were
translated, with their own labels, and on the targets where S is sure of them. Whether a round pays depends on whether the next S
is better: in the measurements of docs/flipping.md it was not.

Takes the options of launch/train.py for the translators, but for --run-dir, --data.match and --method.semantic.segmenter, which
it sets itself. The method must have L_sem: cut, fastcut, srunit and others do. All is kept in DIR, and the same command again
continues where it was stopped."""


def parser() -> OptionParser:
    result = OptionParser(
        "rounds.py",
        description=DESCRIPTION,
        epilog="example: python launch/rounds.py --data data/gta2city --rounds 2 --out runs/rounds --judge runs/segmenter "
        "--method cut --method.semantic.mask true --method.semantic.jitter 0.5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    option = result.add_argument
    option(
        "--data",
        required=True,
        metavar="ROOT",
        help="prepared data with labelled sources: a folder or s3://bucket/prefix",
    )
    option(
        "--out", required=True, type=local_path, metavar="DIR", help="folder of all runs and of the data between them"
    )
    option("--rounds", type=int, default=2, metavar="N", help="translators trained one after the other [%(default)s]")
    option("--sure", type=float, default=0.9, metavar="X", help="least probability of a target's label [%(default)s]")
    option(
        "--judge", metavar="RUN_OR_FILE",
        help="a segmenter to evaluate each translator with, none of those trained here (as --evaluation.segmenter) [none]",
    )  # fmt: skip
    option(
        "--segmenter-config", metavar="FILE",
        help="YAML file of options of launch/train_segmenter.py for every S [jitter: 1, class_weights: 0.5, model.members: 3]",
    )  # fmt: skip
    return result


def translators(arguments: Sequence[str], data: str, judge: str | None) -> JobConfig:
    """What the options of launch/train.py mean for every translator."""
    method = str(task_and_method(arguments).get("method.name", DEFAULT_METHOD))
    if "method.semantic.segmenter" not in [name for name, _, _ in leaves(job_class(method))]:
        raise UserError(
            f"{method} has no L_sem (method.semantic), which keeps classes in rounds: give another --method, such as cut"
        )
    under = {"method.semantic.segmenter": "S", "method.semantic.weight": WEIGHT}
    given = parse_arguments([*arguments, "--data", data], under)
    if flatten(given)["method.semantic.segmenter"] != "S":
        raise UserError("rounds train the segmenters themselves: leave out --method.semantic.segmenter")
    if given.run_dir or given.data.match:
        raise UserError(
            "rounds name their run folders in --out and make their own matches: leave out --run-dir and --data.match"
        )
    options = flatten(given)
    if judge:
        every = given.evaluation.every or given.optim.total_epochs
        options |= {"evaluation.segmenter": judge, "evaluation.every": every}
    return make_config(options)


@exits_cleanly
def main() -> None:
    args, others = parser().parse_known_args(sys.argv[1:])
    setup_logging(None)
    if args.rounds < 1:
        raise UserError(f"{args.rounds} rounds train nothing: give 1 or more")
    segmenter = GUIDE | (read_yaml(args.segmenter_config) if args.segmenter_config else {})
    rounds = Rounds(args.out, translators(others, args.data, args.judge), segmenter, args.sure)
    for number in range(args.rounds):
        rounds.translator(number)
        print(table([rounds.metrics(earlier) for earlier in range(number + 1)]), flush=True)
    print(f"the last translator: {rounds.translator(args.rounds - 1)}")


if __name__ == "__main__":
    main()
