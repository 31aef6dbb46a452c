"""A run or model as a service. `launch/serve.py` runs it."""

import argparse
from pathlib import Path

from launch.runs.chosen import chosen, load_chosen
from launch.serving.server import Service, serve
from trainer.segmentation.load import load_segmenter


def serve_run(args: argparse.Namespace, service: Service) -> None:
    """Serve until SIGTERM. UserError, before anything is started, for what cannot work."""
    translator = load_chosen(chosen(args), args.averaged, "cpu", direction=args.direction)
    if service.segmenter:
        load_segmenter(Path(service.segmenter))
    translation, limits = translator.translation, service.limits
    about: dict[str, object] = {
        "model": args.run.resolve().name, "direction": args.direction,
        "styles": translation.code_shape(64, 64) is not None, "segmenter": service.segmenter is not None,
        "max_bytes": limits.max_bytes, "max_pixels": limits.max_pixels, "smallest": translation.sizes.smallest,
    }  # fmt: skip
    serve(service, translator, about)
