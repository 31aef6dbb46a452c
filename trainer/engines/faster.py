"""What makes a GPU faster where it works: compiled passes, and norms by Triton. Each may be on, off, or auto."""

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from infra.errors import UserError
from trainer.methods.base import Method
from trainer.networks import norm_fused
from trainer.networks.compiling import Compilable, allow_variants
from trainer.networks.norm import EPSILON, InstanceNorm2d

SWITCH = ("auto", "true", "false")

log = logging.getLogger(__name__)


def is_on(switch: str, device: torch.device) -> bool:
    """auto: on a GPU with Triton, which torch.compile makes a GPU's kernels with, too."""
    return switch == "true" or (switch == "auto" and device.type == "cuda" and has_triton())


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def use_compiler(method: Method[Any, Any], switch: str, device: torch.device) -> None:
    """Have a method's networks compiled when they first run; of auto, those whose passes have been tried whole."""
    if not is_on(switch, device):
        return
    allow_variants()
    log.info("passes of the networks are compiled as they first run, about a minute each; a later start finds them")
    for part in method.compiled_parts():
        if isinstance(part, Compilable):
            part.compiled = True
        elif switch == "true":
            part.compile(dynamic=False)


def use_triton(method: nn.Module, switch: str, device: torch.device) -> None:
    """Have instance norms computed by our kernels. Where that cannot be, auto leaves them as they are with a warning, and true
    is a UserError."""
    if not is_on(switch, device):
        return
    norms = [module for module in method.modules() if isinstance(module, InstanceNorm2d)]
    if not norms:
        if switch == "true":
            raise UserError(
                "--engine.triton true computes instance norm, which these networks have none of: leave it out"
            )
        return
    if why := _refusal(device):
        if switch == "true":
            raise UserError(f"--engine.triton true needs Triton, which does not work here ({why}): leave it out")
        log.warning("Triton does not work here (%s): instance norms take torch's operators, which is slower", why)
        return
    for norm in norms:
        norm.triton = True


def _refusal(device: torch.device) -> str:
    """Why our kernels do not run here; empty: they do."""
    sample = torch.zeros(1, 2, 2, 2, device=device).contiguous(memory_format=torch.channels_last)
    try:
        _, mean, rstd = norm_fused.forward(sample, 0.0, EPSILON, -1.0)
        norm_fused.backward(sample, sample, mean, rstd, 0.0)
    except Exception as error:  # Triton's, and what its compiler and the driver raise
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""
