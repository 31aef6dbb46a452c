"""Train an unpaired image-to-image translator: deepspeed launch/train.py --task gta2city, or torchrun, or python."""

import sys

from infra.errors import exits_cleanly
from launch.runs.config import parse_arguments
from launch.runs.translator import train


@exits_cleanly
def main() -> None:
    train(parse_arguments(sys.argv[1:]))


if __name__ == "__main__":
    main()
