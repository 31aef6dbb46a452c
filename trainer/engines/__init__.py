"""Engines differ only in how gradients travel. The same seed gives the same losses on each, to rounding."""

import os

from trainer.engines.base import Engine, EngineConfig, resolve_precision
from trainer.engines.ddp import DdpEngine
from trainer.engines.deepspeed import DeepSpeedEngine

__all__ = ["Engine", "EngineConfig", "make_engine", "resolve_precision"]

ENGINES = {engine.kind: engine for engine in (Engine, DdpEngine, DeepSpeedEngine)}


def make_engine(config: EngineConfig) -> Engine:
    """The engine asked for, or the one that fits the launcher which started this process."""
    kind = _started_by() if config.kind == "auto" else config.kind
    return ENGINES[kind](config)


def _started_by() -> str:
    if "RANK" not in os.environ:
        return "single"
    # CROSS_RANK is a variable that the deepspeed launcher sets and torchrun does not.
    return "deepspeed" if "CROSS_RANK" in os.environ else "ddp"
