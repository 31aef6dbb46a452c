"""What kind of input is translated, by which translator."""

import argparse
import logging
from pathlib import Path

import numpy as np

from infra.console import setup_logging
from infra.errors import UserError
from launch.runs.chosen import load_chosen
from launch.translating.files import ANY_SIZE, Folder, Form, translate_image
from pipelines.images import picture_of
from trainer.engines import Engine, EngineConfig, make_engine
from trainer.translator import Translator

log = logging.getLogger(__name__)


def translate(args: argparse.Namespace, form: Form) -> None:
    """Do what the options of launch/translate.py ask for. UserError, before anything is written, for what cannot work."""
    if not args.input.exists():
        raise UserError(f"{args.input} does not exist: give an image or a folder of images")
    engine = make_engine(EngineConfig())
    setup_logging(None, engine.rank)
    try:
        _translate(_translator(args, engine), args.input, args.output, form, engine)
    finally:
        engine.close()


def _translator(args: argparse.Namespace, engine: Engine) -> Translator:
    style = args.style
    seed = int(style) if style is not None and style.isdecimal() else None
    example = _example(style) if style is not None and seed is None else None
    translator = load_chosen(args, engine.device, direction=args.direction, seed=seed, example=example)
    if seed is not None and translator.translation.code_shape(*ANY_SIZE) is None:
        raise UserError("this method has no styles to draw: leave out --style, or choose one that has, such as munit")
    return translator


def _example(style: str) -> np.ndarray:
    if not Path(style).is_file():
        raise UserError(f"--style {style} is neither a whole number nor an image file: give one of them")
    return picture_of(Path(style)).colours


def _translate(translator: Translator, source: Path, out: Path, form: Form, engine: Engine) -> None:
    if source.is_dir():
        left_out = Folder(translator, source, out, form, engine).translate()
        log.info("translations: %s%s", out, f"; {left_out} images left out" if left_out else "")
    elif engine.rank == 0:
        translate_image(translator, source, out, form)
        log.info("translation: %s", out)
