"""A CUDA device without the device: torch's fake tensors know shapes, types, places and CUDA's strides but hold no numbers,
and a watch says what a real device would not do, or only slowly.

What it finds: tensors on different devices, reads that make the host wait, calls that CUDA's kernels refuse, feature maps
that are copied from one layout to another, and what a CUDA graph cannot replay. What it cannot find: wrong numbers, slow kernels,
and faults of Triton, DALI, NCCL.
The library of library.py must be loaded before this module is imported.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.cuda.amp.common
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

import trainer.draws
import trainer.engines.faster
import trainer.step_graphs
from launch.benchmarks.counting import tensors_in
from trainer.methods.base import Losses
from trainer.step_graphs import Run

DEVICE = torch.device("cuda", 0)
ROOT = Path(__file__).parents[3]
PACKAGES = tuple(
    str(ROOT / package) for package in ("trainer", "pipelines", "launch", "tests/trainer/simulated_cuda/faults.py")
)
aten = torch.ops.aten


# ---- what CUDA's kernels refuse --------------------------------------------------------------------------------------


def _one_type(*places: int) -> Callable[[tuple[Any, ...]], bool]:
    """Whether the tensors at these places of an operator's arguments are of one type."""
    return lambda args: len({args[i].dtype for i in places if i < len(args) and isinstance(args[i], Tensor)}) <= 1


def _statistics_of_batch_norm(x: int, weight: int) -> Callable[[tuple[Any, ...]], bool]:
    def accepts(args: tuple[Any, ...]) -> bool:
        of_weight = {
            args[i].dtype for i in (weight, weight + 1, weight + 2) if i < len(args) and isinstance(args[i], Tensor)
        }
        narrow = args[x].dtype in (torch.float16, torch.bfloat16)
        return of_weight <= {args[x].dtype} or (narrow and of_weight == {torch.float32})

    return accepts


def _equal_lists(count: int) -> Callable[[tuple[Any, ...]], bool]:
    return lambda args: len({x.dtype for each in args[:count] for x in each}) <= 1


# Operator -> whether the kernel takes its arguments' types and places, and where in torch's source (2.13) that is said.
# Fake tensors do not know these rules: kernels of a CPU differ in them.
KERNEL_RULES: dict[Any, tuple[Callable[[tuple[Any, ...]], bool], str]] = {
    aten.native_group_norm.default: (
        _one_type(0, 1, 2), "native/cuda/group_norm_kernel.cu: weights are read by const_data_ptr<T>, T the features' type"),
    aten.native_group_norm_backward.default: (
        _one_type(0, 1, 2, 3, 4), "native/cuda/group_norm_kernel.cu: statistics and weights are read as the features' type"),
    aten.native_batch_norm.default: (
        _statistics_of_batch_norm(0, 1), "native/cuda/Normalization.cu: is_mixed_type, half features with float32 weights"),
    aten.native_batch_norm.out: (
        _statistics_of_batch_norm(0, 1), "native/cuda/Normalization.cu: is_mixed_type, half features with float32 weights"),
    aten.native_batch_norm_backward.default: (
        lambda args: _one_type(0, 1)(args) and _statistics_of_batch_norm(1, 2)((*args[:3], None, None)),
        "native/cuda/Normalization.cu: batch_norm_backward_cuda"),
    aten.convolution_backward.default: (
        _one_type(0, 1, 2), "native/cudnn/ConvShared.cpp: checkAllSameType of gradient, input and weight"),
    aten.mm.default: (_one_type(0, 1), "native/cuda/Blas.cpp: \"expected mat1 and mat2 to have the same dtype\""),
    aten.addmm.default: (_one_type(0, 1, 2), "native/cuda/Blas.cpp: \"expected mat1 and mat2 to have the same dtype\""),
    aten.reflection_pad2d_backward.default: (
        _one_type(0, 1), "native/cuda/ReflectionPad.cu: one scalar_t for gradient and result, which is like the input"),
    aten.replication_pad2d_backward.default: (
        _one_type(0, 1), "native/cuda/ReplicationPadding.cu: one scalar_t for gradient and result"),
    aten.index_add.default: (_one_type(0, 3), "native/TensorAdvancedIndexing.cpp: \"self and source\" of one type"),
    aten.index_add_.default: (_one_type(0, 3), "native/TensorAdvancedIndexing.cpp: \"self and source\" of one type"),
    aten.nll_loss_forward.default: (
        lambda args: args[1].dtype in (torch.int64, torch.uint8), "native/cuda/NLLLoss.cu: NLL_LOSS_INDEX types"),
    aten._fused_adam_.default: (
        lambda args: _equal_lists(4)(args) and all(step.is_cuda for step in args[5]),
        "native/cuda/fused_adam_utils.cuh: one scalar_t for weights, gradients and both moments; the device reads the steps"),
    aten._fused_sgd_.default: (_equal_lists(2), "native/cuda/FusedSgdKernel.cu: one scalar_t for weights and gradients"),
}  # fmt: skip

KERNEL_RULES[aten._fused_adam_.tensor_lr] = KERNEL_RULES[aten._fused_adam_.default]
KERNEL_RULES[aten._fused_sgd_.tensor_lr] = KERNEL_RULES[aten._fused_sgd_.default]

# Torch knows no shapes for these, of which there are none: they change what they are given.
_SHAPES = torch.library.Library("aten", "IMPL", "Meta")
for _name in ("_fused_sgd_", "_fused_sgd_.tensor_lr", "_fused_adam_.tensor_lr"):
    _SHAPES.impl(_name, lambda *args, **kwargs: None)


def _refuses(operator: Any, args: tuple[Any, ...]) -> str | None:
    """Why CUDA's kernel would refuse a call, or None."""
    accepts, source = KERNEL_RULES.get(operator, (None, ""))
    if accepts is None or accepts(args):
        return None
    given = dict.fromkeys(f"{x.dtype} on {x.device.type}".removeprefix("torch.") for x in tensors_in(args))
    return f"CUDA's kernel does not take {', '.join(given)}; {source}"


# ---- what makes the host wait ----------------------------------------------------------------------------------------


def _waits(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a call would have the host wait for the device, or None."""
    if operator in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        indices = [index for index in args[1] if index is not None]
        fills = operator is not aten.index.Tensor and args[2].numel() == 1  # torch turns this into a masked fill
        if not fills and any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return "indexing by a mask counts what is true"
        return "indices are brought to the device" if any(not index.is_cuda for index in indices) else None
    if torch.Tag.data_dependent_output in operator.tags or torch.Tag.dynamic_output_shape in operator.tags:
        return "what comes back depends on values"
    if operator is aten._to_copy.default:
        source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
        return _copy_waits(source, target, bool(kwargs.get("non_blocking")))
    if operator is aten.copy_.default:
        return _copy_waits(args[1].device, args[0].device, len(args) > 2 and bool(args[2]))
    return None


def _copy_waits(source: torch.device, target: torch.device, non_blocking: bool) -> str | None:
    if source.type == target.type:
        return None
    if target.type == "cpu":
        return "a copy to the host"
    return None if non_blocking else "a copy from the host that waits for its end (non_blocking is not set)"


# ---- the watch -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """kind: synchronisation, types, layout, capture, or error. place: of this project's code that is nearest to the call."""

    kind: str
    operator: str
    why: str
    place: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.operator} at {self.place} ({self.why})"


class Watch(TorchDispatchMode):
    """Notes what happens to fake tensors on the device while `notes` is entered. Numbers read from them are made up."""

    def __init__(self) -> None:
        super().__init__()
        self.findings: dict[Finding, None] = {}
        self._noting = self._capturing = False
        self._pinned = WeakTensorKeyDictionary()  # on the host, where a device writes without being waited for
        self.events: list[Event] = []  # in the order in which they were recorded last

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """While a step would be captured, of which the host's part is not replayed."""
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False

    @contextmanager
    def notes(self) -> Iterator[dict[Finding, None]]:
        self._noting = True
        try:
            yield self.findings
        except Exception as error:
            self.findings[_end_of_step(error)] = None
        finally:
            self._noting = False

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.prim.device.default and not args[0].fake_mode.in_kernel_invocation:
            return args[0].fake_device  # two calls of three ask it
        kwargs = kwargs or {}
        given = tensors_in((*args, *kwargs.values()))
        for x in given:
            if isinstance(x, FakeTensor):
                x.constant = None  # of torch.tensor(...): torch would compute with it on the real device
        on_device = any(x.is_cuda for x in given) or torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if self._noting and on_device:
            if (why := _waits(operator, args, kwargs)) and not self._goes_on_its_way(operator, args):
                self._note("synchronisation", operator, why)
            if why := _refuses(operator, args):
                self._note("types", operator, why)
        if operator is aten._local_scalar_dense.default:
            return _made_up(args[0])
        pinned = kwargs.pop("pin_memory", False)
        result = operator(*args, **kwargs)
        if pinned:
            self._pinned[result] = True
        if self._noting and self._capturing and any(x.device.type == "cpu" for x in [*given, *tensors_in((result,))]):
            self._note("capture", operator, "a tensor on the host is read or made, which no replay does")
        if self._noting and on_device and not _is_view(operator):
            before, after = _layouts(given), _layouts(tensors_in((result,)))
            if before and after and len({*before, *after}) > 1:
                self._note("layout", operator, f"maps go from {' and '.join(before)} to {' and '.join(after)}")
        return result

    def _goes_on_its_way(self, operator: Any, args: tuple[Any, ...]) -> bool:
        return operator is aten.copy_.default and args[0] in self._pinned and bool(args[2:3] == (True,))

    def waits_for(self, event: "Event") -> None:
        """The host does: what was given to the device after it is then all that it has left to do."""
        if self._noting and event is self.events[-1]:
            self._note("synchronisation", "Event.synchronize", "nothing was recorded after this event")

    def _note(self, kind: str, operator: Any, why: str) -> None:
        self.findings[Finding(kind, str(operator), why, place_of(sys._getframe(2)))] = None


@functools.cache
def _is_view(operator: Any) -> bool:
    return any(value.alias_info is not None and not value.alias_info.is_write for value in operator._schema.returns)


def _layouts(tensors: list[Tensor]) -> list[str]:
    """Those of the feature maps among them: of more than 3 channels, which leaves out images, and 8 pixels or more each
    way, which leaves out weights."""
    found = set()
    for x in tensors:
        if x.ndim == 4 and x.is_cuda and x.shape[1] > 3 and min(x.shape[2:]) >= 8:
            strides = x.stride()
            if strides[1] == 1 and strides[3] != 1:
                found.add("channels-last")
            elif strides[3] == 1 and strides[1] != 1:
                found.add("contiguous")
    return sorted(found)


def _made_up(x: Tensor) -> Any:
    return {torch.bool: True}.get(x.dtype, 0.75 if x.dtype.is_floating_point else 1)


def place_of(frame: Any) -> str:
    """file:function:line of the innermost frame that is this project's."""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGES):
            return f"{Path(path).relative_to(ROOT)}:{frame.f_code.co_qualname}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch's own backward pass"


def _end_of_step(error: Exception) -> Finding:
    """What ended a step, and where."""
    place, trace = "torch", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(PACKAGES):
            code = trace.tb_frame.f_code
            place = f"{Path(code.co_filename).relative_to(ROOT)}:{code.co_qualname}:{trace.tb_lineno}"
        trace = trace.tb_next
    return Finding("error", type(error).__name__, str(error).splitlines()[0], place)


# ---- the device ------------------------------------------------------------------------------------------------------


def _replace_tensors(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which moves tensors in place, as fake ones cannot."""
    for part in module.modules() if recurse else (module,):
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(convert(parameter.detach()), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = convert(buffer)
    return module


class Event:
    """Stands in for torch.cuda.Event."""

    watch: Watch

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self) -> None:
        self.watch.events.append(self)

    def synchronize(self) -> None:
        self.watch.waits_for(self)

    def elapsed_time(self, later: "Event") -> float:
        return 1000.0


class Capture:
    """In place of CUDA's: a step that is captured, or replayed, runs anew, and what the host does in it is noted."""

    watch: Watch

    def __init__(self, device: torch.device) -> None:
        pass

    def __call__(self, run: Run, /) -> tuple[Losses, Run]:
        def again() -> Losses:
            with self.watch.capturing():
                return run()

        return again(), again

    def warming(self) -> AbstractContextManager[None]:
        return nullcontext()


@contextmanager
def simulated_cuda() -> Iterator[Watch]:
    """Inside, torch has one CUDA device and every new tensor is fake. For a process that does nothing else."""
    # torch.tensor(…, device="cuda") allocates on the device before it is asked whether tensors are fake.
    tensor = torch.tensor
    of_cpu, from_numpy = trainer.draws.generator, torch.from_numpy
    changed: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "Event", Event),
        (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        # A CPU build has no generator for the device. Fake tensors draw nothing anyway.
        (
            trainer.draws,
            "generator",
            lambda device, *key: of_cpu(device, *key) if torch.device(device).type == "cpu" else None,
        ),
        # Otherwise torch takes what is done to lists of fake tensors one by one.
        (
            torch.utils._foreach_utils,
            "_foreach_supported_types",
            [*torch.utils._foreach_utils._foreach_supported_types, FakeTensor],
        ),
        (trainer.engines.faster, "has_triton", lambda: True),  # whose kernels are not run either
        (nn.Module, "_apply", _replace_tensors),
        (torch, "from_numpy", from_numpy),
        (trainer.step_graphs, "CudaCapture", Capture),
        (torch, "tensor", lambda data, dtype=None, device="cpu": tensor(data, dtype=dtype).to(device)),
        (FakeTensor, "numpy", lambda self: np.zeros(self.shape, str(self.dtype).removeprefix("torch."))),
        (FakeTensorMode, "__deepcopy__", lambda self, memo: self),  # which its tensors' copies belong to
    ]
    before = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in changed]
    for owner, name, value in changed:
        setattr(owner, name, value)
    try:
        with FakeTensorMode(allow_non_fake_inputs=False) as mode, Watch() as watch:
            Event.watch = Capture.watch = watch
            torch.from_numpy = lambda ndarray: mode.from_tensor(from_numpy(ndarray))
            yield watch
    finally:
        for owner, name, value in before:
            delattr(owner, name) if value is None else setattr(owner, name, value)
