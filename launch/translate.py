"""Translate images, folders and prepared data with a trained run: python launch/translate.py runs/NAME INPUT OUTPUT."""

import argparse

from infra.console import setup_logging
from infra.errors import exits_cleanly
from launch.runs.chosen import add_choice
from launch.translating.files import ENDINGS
from launch.translating.inputs import translate
from trainer.engines.base import PRECISIONS

DESCRIPTION = """Translate what INPUT is into OUTPUT, which has the same names and sizes.

  an image    JPEG, PNG, WebP, TIFF, BMP, GIF or PPM, of any size that is not too small; grey, transparent or with 16 bits a
              channel; turned upright as its EXIF orientation says
  a folder    all images in it and in its folders
  a film      MP4, MOV, MKV, WebM or AVI, with PyAV (pip install av); all frames have one style
  a root      data that launch/prepare.py prepared, a folder or s3://bucket/prefix: labels and keys are carried over, the other
              domain is copied, and all commands take the result like any other

The same command again goes on where it was stopped, and changes nothing once all is there. Under torchrun the ranks share
the work. docs/translating.md has the rest."""

EXAMPLES = """examples:
  python launch/translate.py runs/streets photo.jpg translated.jpg
  torchrun --nproc_per_node 8 launch/translate.py runs/streets frames translated --format png
  python launch/translate.py runs/streets s3://bucket/gta2city s3://bucket/gta-as-cityscapes --address head:6379
  python launch/translate.py runs/streets s3://bucket/gta2city s3://bucket/gta-as-cityscapes
  python launch/translate.py runs/animals cat.png dog.png --style 7 --variants 3"""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "translate.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    option = result.add_argument
    add_choice(result)
    option("input", metavar="INPUT", help="an image, a folder of images, a film or a prepared root")
    option("output", metavar="OUTPUT", help="of the same kind")
    option("--direction", choices=("AtoB", "BtoA"), default="AtoB", help="BtoA: from the target to the source domain, "
           "for methods that have both [%(default)s]")  # fmt: skip
    option("--style", metavar="SEED_OR_IMAGE", help="for methods with styles: a number to draw them by, or an image of the "
           "other domain whose style all take [the run's seed]")  # fmt: skip
    option("--variants", type=int, metavar="K", help="K styles: into the folders variant_1 to variant_K of OUTPUT, or of an "
           "image the files NAME_1 to NAME_K [one style, and OUTPUT itself]")  # fmt: skip
    option("--format", choices=tuple(ENDINGS), help="of images; in a root jpg or png [that of each input]")
    option("--quality", type=int, metavar="N", help="of JPEG and WebP, 1 to 100 [95; in a root its own]")
    option("--tile", type=int, metavar="N", help="translate images larger than NxN in tiles of that size: the same pixels in "
           "memory for one tile, in two to three times the time [whole images]")  # fmt: skip
    option("--precision", choices=("auto", *PRECISIONS), default="auto", help="to compute in; auto: bf16 where the hardware has "
           "it, else fp32, which images of 16 bits have anyway [%(default)s]")  # fmt: skip
    option("--on-bad-sample", choices=("fail", "skip"), default="fail", help="an image that cannot be read or is too small: "
           "stop with its name, or leave it out [%(default)s]")  # fmt: skip
    option("--on-bad-shard", choices=("fail", "skip"), default="fail", help="a shard of a root that is missing or damaged: "
           "stop with its name, or leave it out [%(default)s]")  # fmt: skip
    option("--address", metavar="HOST:PORT", help="of a Ray cluster's head, or auto: its machines translate the shards of a "
           "root, which all of them see [this machine, without Ray]")  # fmt: skip
    option("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return result


@exits_cleanly
def main() -> None:
    setup_logging(None)
    translate(parser().parse_args())


if __name__ == "__main__":
    main()
