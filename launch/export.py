"""Export a trained translator for other programs: python launch/export.py runs/NAME --to onnx --out FILE.onnx."""

import argparse

from infra.console import setup_logging
from infra.disk import local_path
from infra.errors import exits_cleanly
from launch.runs.chosen import add_choice
from launch.runs.export import FILES, UNSTATED, export
from pipelines.images import parse_size
from trainer.export.graph import PRECISIONS, Form

DESCRIPTION = """Export a trained translator for other programs.

  onnx   an ONNX file (opset 20) for onnxruntime, TensorRT, OpenVINO, Core ML and others
  torch  a program for torch.export.load, without a line of this project's code
  aoti   a library that AOTInductor compiles for the GPU where there is one, else for this CPU; needs g++
  hub    a folder in the layout of the Hugging Face Hub: weights, options and a model card, which all commands here read

Images are float32 (n, 3, h, w) in [-1, 1], in and out, whose sides are multiples of what the file's metadata says (4, mostly);
with --uint8 they are uint8 RGB (n, h, w, 3) of any size, as Pillow, OpenCV and numpy have them. Batch, height and width
are free. A method with styles has a second input, drawn from N(0, 1). Before a file is written it is run at three
sizes and compared with the network; one that differs is refused. docs/exporting.md has more."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "export.py",
        description=DESCRIPTION,
        epilog="example: python launch/export.py runs/streets --to onnx --uint8 --out streets.onnx",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    option = result.add_argument
    add_choice(result)
    option("--to", required=True, choices=[*FILES, "hub"], help="what to write")
    option("--out", required=True, type=local_path, metavar="PATH", help="where; nothing may be there yet")
    option("--direction", default="AtoB", choices=("AtoB", "BtoA"), help="from source to target, or back [%(default)s]")
    option("--precision", default="fp32", choices=list(PRECISIONS), help="what is computed in [%(default)s]")
    option("--uint8", action="store_true", help="images as uint8 (n, h, w, 3) of any size, in and out")
    option("--size", metavar="WxH", help="bind width and height, as some programs want it [free]")
    option("--licence", default=UNSTATED, metavar="TEXT", help="of the weights, such as cc-by-nc-4.0 [not stated]")
    option(
        "--sample", type=local_path, metavar="IMAGE", help="for the model card of hub [the run's newest sample picture]"
    )
    return result


@exits_cleanly
def main() -> None:
    args = parser().parse_args()
    setup_logging(None)
    export(args, Form(args.direction, args.precision, args.uint8, parse_size(args.size) if args.size else None))


if __name__ == "__main__":
    main()
