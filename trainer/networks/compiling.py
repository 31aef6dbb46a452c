"""Passes of networks that torch.compile takes as a whole, where an engine says so."""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Of one pass at most: by shapes, taps, and what takes gradients. DRIT has most, 13 of all its passes together, as
# tests/trainer/test_compiled.py counts.
VARIANTS = 32
CACHE = ".compiled"  # in the folder of runs

log = logging.getLogger(__name__)
_refused: set[str] = set()  # passes that could not be compiled in this process


class Compilable(nn.Module):
    """A network whose passes are marked by `whole`.

    compiled: whether torch.compile is to take them while it is in training. A copy of the network has passes of its own.
    """

    compiled: bool = False


def whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a `Compilable` that is compiled without a break, for fixed shapes, and runs as it is where that fails."""

    @functools.wraps(function)
    def run(self: Compilable, *args: Any) -> Any:
        if not self.compiled or not self.training or torch.compiler.is_compiling() or run_name in _refused:
            return function(self, *args)
        try:
            return _compiled(function)(self, *args)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            if not _refused:
                why = " ".join(str(error).splitlines()[:2])  # of torch's line and that of the cause
                log.warning("%s cannot be compiled here (%s) and runs as it is, which is slower; --engine.compile false does not "
                            "try", run_name, why)  # fmt: skip
            _refused.add(run_name)
            return function(self, *args)

    run_name = function.__qualname__
    return run


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def allow_variants() -> None:
    """Before anything is compiled."""
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.optimize_ddp = False  # it would part a discriminator's pass at DDP's buckets


def keep_compiled(runs: Path) -> None:
    """Have later runs of this folder of runs find what this one compiles."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((runs / CACHE).absolute()))
