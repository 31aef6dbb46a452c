"""Evaluate a trained translator on the test images of its data: python launch/evaluate.py runs/NAME."""

import argparse

from infra.console import setup_logging
from infra.disk import local_path
from infra.errors import exits_cleanly
from launch.runs.evaluate import evaluate
from trainer.evaluation.config import EvaluationConfig

DESCRIPTION = """Evaluate a trained translator on the test images of its data, in fp32 whatever it was trained in.

  pxAcc clsAcc mIoU  what a segmenter sees in the translations, against the source's true labels: more is better
  flip rate          share of the pixels that the translation made look like another class: less is better
  Dist Acc(delta)    distance of a pixel from the true picture, where the data has pairs, 0 to 441.7: less is better;
                     share of pixels whose channels are all off by less than delta: more is better
  FID KID            distance of the translations' look from that of real target images: less is better

beside the same of the untranslated source, the baseline, and of real target images, which no translation can be
expected to beat. docs/evaluation.md defines them all.

The run folder gets evaluation.json, evaluation.csv and pictures in samples/ (translations, flip matrix, class
distribution, worst images), and all of it joins the run in MLflow. A checkpoint outside a run folder has them written
beside it. Under torchrun or deepspeed the ranks share the images; the metrics are the same."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "evaluate.py",
        description=DESCRIPTION,
        epilog="example: python launch/evaluate.py runs/streets --segmenter runs/segmenter",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = result.add_argument
    option("run", type=local_path, metavar="RUN_OR_CHECKPOINT", help="runs/NAME (its newest checkpoint) or .../step_N")
    option(
        "--beside",
        type=local_path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="others, whose translations of the same images stand in the table and in evaluation.png beside these",
    )
    option("--data", metavar="ROOT", help="a prepared data set, a folder or s3://bucket/prefix [the one trained on]")
    option(
        "--segmenter", metavar="RUN_OR_FILE", help="a run of launch/train_segmenter.py, or FILE.yaml of another network"
    )
    option("--inception", metavar="FILE", help="weights of Inception V3 (pt_inception-2015-12-05-6726825d.pth)")
    option("--limit", type=int, metavar="N", help="take only N test images, evenly spread [all]")
    option(
        "--json",
        type=local_path,
        metavar="FILE",
        help="NAME.json: write the metrics there and the pictures into a folder NAME; run folder and MLflow stay as they are "
        "[evaluation.json in the run folder]",
    )
    option("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return result


@exits_cleanly
def main() -> None:
    args = parser().parse_args()
    setup_logging(None)
    wanted = EvaluationConfig(images=args.limit, segmenter=args.segmenter, inception=args.inception)
    evaluate(args.run, wanted, beside=args.beside, data=args.data, json_file=args.json)


if __name__ == "__main__":
    main()
