"""Train a semantic segmenter on labelled images: deepspeed launch/train_segmenter.py --data ROOT, or torchrun, or python."""

import sys

from infra.errors import exits_cleanly
from launch.runs.segmenter import parse_arguments, train


@exits_cleanly
def main() -> None:
    train(parse_arguments(sys.argv[1:]))


if __name__ == "__main__":
    main()
