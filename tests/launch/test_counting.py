"""What `Calls` counts, on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.benchmarks.counting import KINDS, Calls
from trainer.networks.norm import InstanceNorm2d
from trainer.networks.padding import Pad2d
from trainer.networks.resample import BlurDownsample


def maps(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 8, 16, 16).to(dtype=dtype, memory_format=torch.channels_last)


def test_views_and_allocations_are_no_calls_and_bytes_are_those_that_are_touched() -> None:
    x, row = torch.ones(4, 8), torch.ones(8)
    with Calls("cpu") as calls:
        y = torch.empty_like(x).t().reshape(8, 4).detach()
        y.t().add(x)
        x * row.expand(4, 8)
        y.zero_()
    assert calls.operators == {"aten.add.Tensor": 1, "aten.mul.Tensor": 1, "aten.zero_.default": 1}
    assert calls.total == 3 and calls.bytes == {"other": 4 * (3 * 32 + 2 * 32 + 8 + 32)}


def test_kinds_are_those_of_operators_and_of_the_code_around_them() -> None:
    layers = {"norm": InstanceNorm2d(8, 0.2), "padding": Pad2d(1), "convolution": nn.Conv2d(8, 8, 3)}
    for kind, layer in layers.items():
        x = maps().requires_grad_()
        with Calls("cpu") as calls:
            layer(x).backward(torch.ones_like(layer(x)))
        assert calls.calls.most_common(1)[0][0] == kind and set(calls.calls) <= {kind, "other"}, kind
    with Calls("cpu") as calls:
        BlurDownsample(8)(maps())
        torch.cat([torch.ones(2), torch.ones(2)])
        torch.ones(2, 2) @ torch.ones(2, 2)
        torch.rand(2)
        torch.ones(2).bfloat16()
        torch.optim.Adam([nn.Parameter(torch.ones(2))], fused=True).step()
        weight = nn.Parameter(torch.ones(2))
        weight.grad = torch.ones(2)
        torch.optim.Adam([weight], fused=True).step()
    assert all(calls.calls[kind] for kind in KINDS if kind not in ("norm", "convolution"))


def test_what_a_convolution_would_copy_is_seen() -> None:
    convolution = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with Calls("cpu") as calls:
        convolution(maps())
        convolution(maps()[:, :, :8, :8].clone())
    assert not calls.copies
    for given in (maps().contiguous(), maps()[:, :, :8, :8]):  # another layout, and one with gaps
        with Calls("cpu") as calls:
            convolution(given)
        assert calls.copies.total() == 1


def test_casts_of_maps_and_those_that_come_back_are_seen() -> None:
    x, weight = maps(), torch.ones(8, 8, 3, 3)
    with Calls("cpu") as calls:
        weight.bfloat16()
        narrow = x.bfloat16()
    assert calls.casts.total() == 1 and not calls.returns
    with Calls("cpu") as calls:
        narrow.float().bfloat16()
        F.relu(narrow.float())
    assert calls.casts.total() == 3 and calls.returns.total() == 1


def test_reads_by_the_host_are_seen() -> None:
    with Calls("cpu") as calls:
        torch.ones(2).sum().item()
    assert calls.waits.total() == 1
