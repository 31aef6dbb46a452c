"""Which trained translator a command means, and the options that say so."""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from infra.disk import local_path
from trainer.checkpoint import AUTO
from trainer.translator import Translator, find_translation, load_translator

log = logging.getLogger(__name__)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_CHECKPOINT, --checkpoint and --averaged, as `run`, `checkpoint` and `averaged`."""
    option = parser.add_argument
    option("run", type=local_path, metavar="RUN_OR_CHECKPOINT", help="runs/NAME, or a checkpoint in it")
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


def chosen(args: argparse.Namespace) -> Path:
    """The folder that the options of `add_choice` mean. Of a run that goes on training it is another one a moment later."""
    return find_translation(args.run, args.checkpoint)


def load_chosen(folder: Path, averaged: bool | None, device: torch.device | str, **given: Any) -> Translator:
    """The translator in such a folder; the log says which. Otherwise as `load_translator`, whose options are `given`."""
    translator = load_translator(folder, device, averaged=averaged, **given)
    translator.translation.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as images are
    with_average = averaged is not False and any(folder.glob("*_ema.safetensors"))
    log.info("translating with %s%s", folder, ", its moving average" if with_average else "")
    return translator
