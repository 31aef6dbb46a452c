"""Evaluate a trained translator on the test images of its data: python launch/evaluate.py runs/NAME."""

import argparse
from pathlib import Path

from infra.console import setup_logging
from infra.errors import exits_cleanly
from launch.evaluation import evaluate, table

DESCRIPTION = """Evaluate a trained translator on the test images of its data, in fp32 whatever it was trained in.

Where source and target show the same scenes, two figures say how far the translations are from the true pictures,
beside those of the untranslated source, which are the ones to beat (SRUNIT, Sec. 5.1.3):
  Dist        Euclidean distance of two pixels in RGB, 0 to 441.7, averaged over all pixels: less is better
  Acc(delta)  share of pixels whose three channels are all off by less than delta: more is better

The run folder gets evaluation.json and samples/evaluation.png (source | translation | true target), and the figures
join the run in MLflow. A checkpoint outside a run folder has them written beside it."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "evaluate.py",
        description=DESCRIPTION,
        epilog="example: python launch/evaluate.py runs/streets --limit 100",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = result.add_argument
    option("run", type=Path, metavar="RUN_OR_CHECKPOINT", help="runs/NAME (its newest checkpoint) or .../step_N")
    option("--data", metavar="ROOT", help="a prepared data set, a folder or s3://bucket/prefix [the one trained on]")
    option("--limit", type=int, metavar="N", help="take only the first N test images [all]")
    option("--json", type=Path, metavar="FILE", help="write the figures there [evaluation.json in the run folder]")
    return result


@exits_cleanly
def main() -> None:
    args = parser().parse_args()
    setup_logging(None)
    result = evaluate(args.run, data=args.data, limit=args.limit, json_file=args.json)
    print(table(result.figures) or f"{result.data} has no pairs, so there is nothing to compare pixel by pixel")
    print(f"{result.images} test images of {result.data}, translated by {result.checkpoint}")
    print(f"figures: {result.json_file}\npicture: {result.picture_file}")


if __name__ == "__main__":
    main()
