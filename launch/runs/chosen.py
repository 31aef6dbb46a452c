"""Which trained translator a command means, and the options that say so."""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch

from trainer.checkpoint import AUTO
from trainer.tiling import Tiles
from trainer.translator import Translator, find_translation, load_translator

log = logging.getLogger(__name__)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_CHECKPOINT, --checkpoint and --averaged, as `run`, `checkpoint` and `averaged`."""
    option = parser.add_argument
    option("run", type=Path, metavar="RUN_OR_CHECKPOINT", help="runs/NAME, or a checkpoint in it")
    option(
        "--checkpoint",
        default=AUTO,
        metavar="WHICH",
        help="of a run: best, latest or step_N; auto: the best where the run evaluated itself, else the latest [auto]",
    )
    option(
        "--averaged",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the moving average of the weights [where the run kept one]",
    )


def load_chosen(
    args: argparse.Namespace,
    device: torch.device | str,
    *,
    direction: str = "AtoB",
    seed: int | None = None,
    example: np.ndarray | None = None,
    tiles: Tiles | None = None,
    dtype: torch.dtype | None = None,
) -> Translator:
    """The translator that the options of `add_choice` mean; the log says which. Otherwise as `load_translator`."""
    folder = find_translation(args.run, args.checkpoint)
    translator = load_translator(
        folder,
        device,
        averaged=args.averaged,
        direction=direction,
        seed=seed,
        example=example,
        tiles=tiles,
        dtype=dtype,
    )
    translator.translation.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as images are
    averaged = args.averaged is not False and any(folder.glob("*_ema.safetensors"))
    log.info("translating with %s%s", folder, ", its moving average" if averaged else "")
    return translator
