"""Faults that the simulated device has to find: small ones, and some planted in the code of a whole step."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.methods.parts import contrast
from trainer.methods.parts.image_buffers import ImageBuffers
from trainer.networks import norm
from trainer.networks.padding import Pad2d


def _maps(device: torch.device) -> Tensor:
    """Feature maps, channels-last, in bf16."""
    maps = torch.empty(1, 8, 16, 16, device=device, dtype=torch.bfloat16, memory_format=torch.channels_last)
    return maps.requires_grad_()


def _weight(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.empty(8, dtype=dtype, device=device)


def _backward(result: Tensor) -> None:
    """From a gradient that is channels-last where the features are."""
    result.backward(torch.empty_like(result))


# Name -> the kind of the first finding, and what makes it on a device.
SMALL: dict[str, tuple[str, Callable[[torch.device], Any]]] = {
    "two devices": ("error", lambda device: _maps(device) + torch.ones(1, 8, 16, 16)),
    "ids on the host": ("error", lambda device: _maps(device).index_select(2, torch.arange(3))),
    "item": ("synchronisation", lambda device: _maps(device).mean().item()),
    "float": ("synchronisation", lambda device: float(_maps(device).mean())),
    "bool": ("synchronisation", lambda device: bool((_maps(device) > 0).any())),
    "tolist": ("synchronisation", lambda device: torch.arange(3, device=device).tolist()),
    "to the host": ("synchronisation", lambda device: _maps(device).cpu()),
    "from the host": ("synchronisation", lambda device: torch.arange(3).to(device)),
    "copied from the host": ("synchronisation", lambda device: torch.arange(3, device=device).copy_(torch.arange(3))),
    "made from a list": ("synchronisation", lambda device: torch.tensor([1, 2], device=device)),
    "mask": ("synchronisation", lambda device: _maps(device)[_maps(device) > 0]),
    "masked assignment": (
        "synchronisation",
        lambda device: _maps(device).detach().index_put_((_maps(device) > 0,), torch.empty(5, device=device).bfloat16()),
    ),
    "index on the host": ("synchronisation", lambda device: _maps(device)[:, torch.tensor([0, 2])]),
    "nonzero": ("synchronisation", lambda device: _maps(device).nonzero()),
    "equal": ("synchronisation", lambda device: torch.equal(_maps(device), _maps(device))),
    "group norm with wider weights": (
        "types",
        lambda device: torch.ops.aten.native_group_norm(
            _maps(device).flatten(2), _weight(device, torch.float32), None, 1, 8, 256, 8, 1e-5
        ),
    ),
    "batch norm with narrower weights": (
        "types",
        lambda device: F.batch_norm(_maps(device), None, None, _weight(device, torch.float16), training=True),
    ),
    "product of two types": (
        "types", lambda device: _weight(device, torch.bfloat16)[None] @ torch.empty(8, 3, device=device)
    ),
    "made contiguous": ("layout", lambda device: _maps(device).contiguous()),
    "made channels-last": (
        "layout", lambda device: torch.empty(1, 8, 16, 16, device=device).to(memory_format=torch.channels_last)
    ),
    "stock padding": ("layout", lambda device: F.pad(_maps(device), (1, 1, 1, 1), mode="reflect")),
    "stock padding's gradient": (
        "layout", lambda device: _backward(F.pad(_maps(device), (1, 1, 1, 1), mode="replicate"))
    ),
}  # fmt: skip

# What must pass: the host does not wait for these.
HARMLESS: dict[str, Callable[[torch.device], Any]] = {
    "copy that does not wait": lambda device: torch.arange(3).to(device, non_blocking=True),
    "masked fill": lambda device: _maps(device).detach().masked_fill_(_maps(device) > 0, 0.0),
    "assignment of a number by a mask": lambda device: torch.empty(3, device=device).index_put_(
        (torch.ones(3, dtype=torch.bool, device=device),), torch.zeros((), device=device)
    ),
    "reading on the host": lambda device: torch.rand(3).tolist(),
    "batch norm with float32 weights": lambda device: F.batch_norm(
        _maps(device), None, None, _weight(device, torch.float32), training=True
    ),
    "norm of contiguous features": lambda device: _backward(
        norm.InstanceNorm2d(8, slope=0.2)(torch.empty(2, 8, 16, 16, device=device).bfloat16().requires_grad_())
    ),
    "padding": lambda device: _backward(Pad2d(1)(_maps(device))),
}

_exchange, _patch_ids = ImageBuffers.exchange, contrast.patch_ids


def _curious_exchange(self: ImageBuffers, images: Tensor, slots: Tensor, uniform: Tensor, place: Tensor) -> Tensor:
    return _exchange(self, images, slots, uniform if images.mean() > 0 else 0 * uniform, place)


# Name -> the kind of finding, the function in which it is, and what is put in place of what.
IN_A_STEP: dict[str, tuple[str, str, tuple[Any, ...]]] = {
    "a step's patch ids stay on the host": (
        "error", "sample_patches", (contrast, "patch_ids", lambda *args: [ids.cpu() for ids in _patch_ids(*args)])),
    "the image buffer looks at its images": (
        "synchronisation", "_curious_exchange", (ImageBuffers, "exchange", _curious_exchange)),
    "a captured step draws on the host": (
        "capture", "_own_patch_ids", (contrast, "patch_ids", lambda *args: _own_patch_ids(*args), True)),
    "norms go to group norm": ("types", "_normalise", (norm, "_in_groups", lambda x: True)),
    "a step's padding is torch's own": (
        "layout", "_stock_forward", (Pad2d, "forward", lambda self, x: _stock_forward(self, x))),
}  # fmt: skip


def _own_patch_ids(features: Any, taps: Any, count: int, stream: str, context: Any) -> list[Tensor]:
    ids = [torch.randperm(feature.shape[2] * feature.shape[3])[:count] for feature in features]
    return [each.to(features[0].device, non_blocking=True) for each in ids]


def _stock_forward(self: Pad2d, x: Tensor) -> Tensor:
    return F.pad(x, self.widths, mode=self.mode)
