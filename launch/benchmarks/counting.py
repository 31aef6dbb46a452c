"""What a step asks of a GPU, counted while it runs: operator calls, bytes by kind of work, hidden copies, casts and waits.

A call is one of torch's operators that computes or copies on the device. Views and allocations launch nothing and are not
counted; a convolution or a fused optimiser counts as one, whatever number of kernels it starts, our own operators as their
kernels. Bytes are those of an operator alone: each tensor that it reads or writes goes once to or from memory, however often it
is read and whatever a cache holds.
"""

import functools
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from trainer.networks.norm_fused import KERNELS

KINDS = ("convolution", "product", "norm", "padding", "resampling", "cast", "join", "draw", "optimiser", "other")
ROOT = Path(__file__).parents[2]
FEATURES = 8  # a map has more pixels each way than a convolution's weight

aten = torch.ops.aten
_CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}
_JOINS = {aten.cat.default, aten.stack.default, aten.stack.out, aten.cat.out}
# Looked for in an operator's name.
_NAMED = {
    "optimiser": ("_fused_adam", "_fused_sgd", "_foreach_"),
    "draw": ("rand", "normal_", "uniform", "bernoulli"),
    "product": ("addmm", "aten.mm", "bmm"),
    "norm": ("instance_norm", "native_batch_norm", "native_group_norm", "leaky_relu", "threshold", "aten.relu"),
}
# Of the code of this project that is nearest to a call.
_FILES = {
    "norm": ("trainer/networks/norm.py", "trainer/networks/norm_batch.py"),
    "padding": ("trainer/networks/padding.py",),
    "resampling": ("trainer/networks/resample.py",),
    "join": ("trainer/networks/split.py",),
}
_CODE = {str(ROOT / file): kind for kind, files in _FILES.items() for file in files}


class Calls(TorchDispatchMode):
    """Counts what happens on devices of this type inside; one for each thing that is counted.

    calls, bytes: by kind of work. operators: calls by operator. places: calls by place in this project's code.
    copies: by place, a convolution whose input, gradient or weight cuDNN would first copy into its layout.
    casts: by place, feature maps that change their type; returns: those that come back to the type they had just left.
    waits: by place, reads and copies for which the host waits.
    """

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device = device
        self.calls, self.bytes = Counter[str](), Counter[str]()
        self.operators, self.places = Counter[str](), Counter[str]()
        self.copies, self.casts, self.returns, self.waits = (Counter[str]() for _ in range(4))
        self._left = WeakIdKeyDictionary()  # of a result of a cast: the type it had before

    @property
    def total(self) -> int:
        return self.calls.total()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_in((*args, *kwargs.values()))
        result = operator(*args, **kwargs)
        made = tensors_in((result,))
        if operator is aten._local_scalar_dense.default and self._here(given):
            self.waits[place_of(sys._getframe(1))] += 1
        elif self._here([*given, *made]) and not launches_nothing(operator):
            self._count(operator, args, kwargs, given, made)
        return result

    def _here(self, tensors: Iterable[Tensor]) -> bool:
        return any(x.device.type == self.device for x in tensors)

    def _count(self, operator: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> None:
        kind = kind_of(operator, args, sys._getframe(2))
        kernels = KERNELS.get(operator.name(), 1)
        self.calls[kind] += kernels
        self.operators[str(operator)] += kernels
        self.places[place_of(sys._getframe(2))] += kernels
        self.bytes[kind] += moved(operator, given, made)
        if operator in _CONVOLUTIONS and any(not _dense(x, _wanted(given)) for x in given if x.ndim == 4):
            self.copies[place_of(sys._getframe(2))] += 1
        if _is_cast(operator, args, made):
            self._note_cast(args[0], made[0])
        if len({x.device.type for x in [*given, *made]}) > 1 and not (
            kwargs.get("non_blocking") or args[2:3] == (True,)
        ):
            self.waits[place_of(sys._getframe(2))] += 1

    def _note_cast(self, before: Tensor, after: Tensor) -> None:
        place = place_of(sys._getframe(3))
        if is_map(before):
            self.casts[place] += 1
        if self._left.get(before) == after.dtype:
            self.returns[place] += 1
        self._left[after] = before.dtype


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among an operator's arguments or results, which may be lists of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [x for x in value if isinstance(x, Tensor)]
    return found


def is_map(x: Tensor) -> bool:
    return x.ndim == 4 and min(x.shape[2:]) >= FEATURES


@functools.cache
def launches_nothing(operator: Any) -> bool:
    """Whether it only allocates, returns a view or asks what a tensor is."""
    name = str(operator)
    if operator.namespace == "prim" or name.startswith(
        ("aten.empty", "aten.new_empty", "aten.detach", "aten.resize_", "aten._has_compatible", "aten.lift")
    ):
        return True
    returns = operator._schema.returns
    return bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)


def kind_of(operator: Any, args: Any, frame: Any) -> str:
    """One of KINDS: by the operator, and where that says nothing by the code of this project that is nearest to the call."""
    if operator in _CONVOLUTIONS:
        weight = args[2] if operator is aten.convolution_backward.default else args[1]
        return "resampling" if weight.shape[1] == 1 and weight.shape[0] > 1 else "convolution"
    if operator is aten._to_copy.default:
        return "cast"
    name = str(operator)
    if not name.startswith("aten.linalg"):
        for kind, parts in _NAMED.items():
            if any(part in name for part in parts):
                return kind
    while frame is not None:
        path = frame.f_code.co_filename
        if path in _CODE:
            return _CODE[path]
        if _in_project(frame.f_code):
            break
        frame = frame.f_back
    return "join" if operator in _JOINS else "other"


def moved(operator: Any, given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes that a call reads and writes at least."""
    if operator in (aten.copy_.default, aten.fill_.Scalar, aten.zero_.default):  # what was there before is not read
        given = given[1:]
    twice = [given[0]] if operator is aten.convolution_backward.default else []  # by both of its products
    if operator.namespace == "instance_norm":  # one kernel sums up the maps, another one computes with the sums
        twice = [x for x in given if x.ndim == 4]
    return sum(held(x) for x in [*given, *twice, *made])


def held(x: Tensor) -> int:
    """Bytes of its elements; one that is expanded counts once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


def _is_cast(operator: Any, args: Any, made: list[Tensor]) -> bool:
    return operator is aten._to_copy.default and args[0].dtype != made[0].dtype


def _wanted(given: list[Tensor]) -> torch.memory_format:
    """The layout in which cuDNN computes: channels-last if one of map and weight has it."""
    last = any(
        x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in given
    )
    return torch.channels_last if last else torch.contiguous_format


def _dense(x: Tensor, layout: torch.memory_format) -> bool:
    return x.is_contiguous(memory_format=layout)


def place_of(frame: Any) -> str:
    """file:function of the innermost frame that is this project's, tools of measuring left out."""
    while frame is not None:
        if place := _in_project(frame.f_code):
            return place
        frame = frame.f_back
    return "torch's backward pass"


@functools.cache
def _in_project(code: CodeType) -> str:
    if not code.co_filename.startswith(str(ROOT / "trainer")):
        return ""
    return f"{Path(code.co_filename).relative_to(ROOT)}:{code.co_qualname}"
