"""What kind of input is translated, by which translator, into how many outputs."""

import argparse
import copy
import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from infra.console import ProgressLine, setup_logging
from infra.errors import UserError
from infra.ray_cluster import check_address
from infra.storage import open_storage
from launch.runs.chosen import chosen, load_chosen
from launch.translating.files import Folder, Form, check_apart, translate_image
from launch.translating.film import is_film, translate_film
from launch.translating.roots import translate_root
from pipelines.derived import Faults, encoding_of
from pipelines.images import picture_of
from pipelines.manifest import MANIFEST, load_manifest
from pipelines.shards import IMAGE_FORMATS
from trainer.engines import Engine, EngineConfig, make_engine
from trainer.exact import exact_arithmetic
from trainer.tiling import Tiles
from trainer.translator import Translator

log = logging.getLogger(__name__)


def translate(args: argparse.Namespace) -> None:
    """Do what the options of launch/translate.py ask for. UserError, before anything is written, for what cannot work."""
    if not (_is_root(args.input) or Path(args.input).exists()):
        raise UserError(f"{args.input} does not exist: give an image, a folder of images, a film or prepared data")
    if "://" in args.output and not _is_root(args.input):
        raise UserError(
            f"{args.output} is a place in a store, where prepared data alone go: name a file or folder here"
        )
    if args.address:
        _check_cluster(args)
    form = Form(args.format, args.quality, skip=args.on_bad_sample == "skip")
    engine = make_engine(EngineConfig(precision=args.precision))
    setup_logging(None, engine.rank)
    try:
        translator = _translator(args, engine)
        for number, out in enumerate(_outputs(args)):
            variant = copy.copy(translator)
            variant.seed += number
            with exact_arithmetic():  # of the precision that was asked for
                _translate(variant, args, out, form, engine)
    finally:
        engine.close()


def _translate(translator: Translator, args: argparse.Namespace, out: str, form: Form, engine: Engine) -> None:
    source, into = Path(args.input), Path(out)
    if _is_root(args.input):
        _translate_root(translator, args, out, form, engine)
    elif source.is_dir():
        left_out = Folder(translator, source, into, form, engine).translate()
        log.info("translations: %s%s", out, f"; {left_out} images left out" if left_out else "")
    elif engine.rank == 0 and is_film(source):
        log.info("%d frames: %s", translate_film(translator, source, into), out)
    elif engine.rank == 0:
        translate_image(translator, source, into, form)
        log.info("translation: %s", out)


def _translate_root(translator: Translator, args: argparse.Namespace, out: str, form: Form, engine: Engine) -> None:
    if "://" not in args.input + out:
        check_apart(Path(args.input), Path(out))
    elif f"{out}/".startswith(f"{args.input.rstrip('/')}/"):
        raise UserError(f"{out} lies in {args.input}: name another OUTPUT")
    if form.ending not in (None, *IMAGE_FORMATS):
        raise UserError(
            f"prepared data hold no {form.ending}: give --format {' or '.join(IMAGE_FORMATS)}, or leave it out"
        )
    before = load_manifest(open_storage(args.input))
    encoding = encoding_of(before)
    encoding = dataclasses.replace(
        encoding, format=form.ending or encoding.format, quality=form.quality or encoding.quality
    )
    faults = Faults(skip_samples=form.skip, skip_shards=args.on_bad_shard == "skip")
    made = translate_root(translator, args.input, out, encoding, faults=faults, ranks=engine, address=args.address)
    counts = [sum(split.samples for split in manifest.splits.values()) for manifest in (before, made)]
    if before.paired and not made.paired:
        log.warning("with images left out, the test images of %s are no pairs any more", out)
    log.info("%d images: %s%s", counts[1], out, f"; {counts[0] - counts[1]} left out" if counts[1] < counts[0] else "")


def _check_cluster(args: argparse.Namespace) -> None:
    if not _is_root(args.input):
        raise UserError(f"--address deals out the shards of prepared data, and {args.input} is none: leave it out")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--address deals out the work by itself: start the command without torchrun or deepspeed")
    check_address(args.address)


def _is_root(place: str) -> bool:
    return "://" in place or (Path(place) / MANIFEST).is_file()


def _outputs(args: argparse.Namespace) -> Iterator[str]:
    """Of each variant."""
    out = Path(args.output)
    for number in range(1, (args.variants or 0) + 1):
        if _is_root(args.input) or Path(args.input).is_dir():
            yield f"{args.output.rstrip('/')}/variant_{number}"
        else:
            if out.is_dir():
                raise UserError(f"{args.input} is one file and {args.output} a folder: name a file")
            yield str(out.with_stem(f"{out.stem}_{number}"))
    if args.variants is None:
        yield args.output


def _translator(args: argparse.Namespace, engine: Engine) -> Translator:
    style, variants = args.style, args.variants
    seed = int(style) if style is not None and style.isdecimal() else None
    example = _example(style) if style is not None and seed is None else None
    if variants is not None and variants < 1:
        raise UserError(f"{variants} variants are none: give 1 or more")
    if variants is not None and example is not None:
        raise UserError("the style of an image is one: leave out --variants, or give --style a number to draw them by")
    tiles = None if args.tile is None else Tiles(args.tile, _scratch(args.output))
    if tiles and Path(args.input).is_file():
        tiles = dataclasses.replace(tiles, on_tile=_TileLine())
    translator = load_chosen(
        chosen(args), args.averaged, "cpu" if args.address else engine.device,
        direction=args.direction, seed=seed, example=example, tiles=tiles, dtype=engine.dtype,
    )  # fmt: skip
    if (seed is not None or variants is not None) and not translator.draws:
        option = "--variants" if seed is None else "--style"
        raise UserError(f"this method has no styles to draw: leave out {option}, or choose one that has, such as munit")
    return translator


def _scratch(out: str) -> Path | None:
    """Where the files of tiles lie: on the disk of the output, as the system's place for such files may be in memory."""
    if "://" in out:
        return None
    return next(place for place in Path(out).absolute().parents if place.is_dir())


class _TileLine:
    """The progress of one large image."""

    def __call__(self, done: int, total: int) -> None:
        if done == 1:
            self._line = ProgressLine(total, unit="tiles", title="tile")
        self._line.update(1)
        if done == total:
            self._line.close()


def _example(style: str) -> np.ndarray:
    if not Path(style).is_file():
        raise UserError(f"--style {style} is neither a whole number nor an image file: give one of them")
    return picture_of(Path(style)).colours
