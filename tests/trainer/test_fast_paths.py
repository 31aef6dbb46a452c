"""Every fast path against the plain one: operators in float64, and whole steps in the precisions that train."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.trainer.one_step import Step
from trainer.methods.base import Losses
from trainer.networks import norm, norm_batch
from trainer.networks.norm import norm_activation, plain_norm_activation
from trainer.networks.padding import Pad2d
from trainer.networks.resample import BlurDownsample, BlurUpsample
from trainer.networks.split import split_batch
from trainer.optim import OptimConfig, make_optimiser

pytestmark = pytest.mark.slow

LAYOUTS = torch.contiguous_format, torch.channels_last
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Far from centred, as a convolution with a bias leaves them."""
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 5).to(dtype)


def in_layout(x: Tensor, layout: torch.memory_format) -> Tensor:
    return x.detach().contiguous(memory_format=layout).requires_grad_()


@contextmanager
def saved_for_the_backward_pass() -> Iterator[list[Tensor]]:
    """What autograd keeps of what is computed inside."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


# ---- the operators ---------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("slope", [1.0, 0.0, 0.2])
@pytest.mark.parametrize("batch", [1, 3])
def test_norm_and_its_gradient(layout: torch.memory_format, slope: float, batch: int) -> None:
    x, gradient = features(batch, 6, 9, 7), features(batch, 6, 9, 7, seed=1)
    reference = in_layout(x, torch.contiguous_format)
    expected = F.leaky_relu(F.batch_norm(reference.reshape(1, -1, 9, 7), None, None, training=True), slope).view_as(x)
    (slopes,) = torch.autograd.grad(expected, reference, gradient)
    given = in_layout(x, layout)
    y = norm_activation(given, slope)
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for other in LAYOUTS:  # torch's own returns wrong numbers for a gradient of another layout, see networks/norm.py
        (actual,) = torch.autograd.grad(y, given, gradient.contiguous(memory_format=other), retain_graph=True)
        assert actual.is_contiguous(memory_format=layout)
        torch.testing.assert_close(actual, slopes, rtol=1e-9, atol=1e-10)


@pytest.fixture(params=[False, True], ids=["", "as on a GPU"])
def any_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features go another way on a GPU, which a CPU can go too."""
    if request.param:
        monkeypatch.setattr(norm, "_in_groups", lambda x: False)
        monkeypatch.setattr(norm, "_kernels", lambda x, triton: None if x.is_contiguous() else norm_batch)


@layouts
@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.bfloat16, 2e-2)])
def test_norm_in_lower_precision(layout: torch.memory_format, dtype: torch.dtype, tolerance: float) -> None:
    # 128x128 pixels: sums in bf16 would be off by far more. Results are of the order 1, so the tolerance is absolute.
    x, gradient = features(2, 3, 128, 128, dtype=dtype), features(2, 3, 128, 128, seed=1, dtype=dtype) - 5
    wide = x.double().requires_grad_()
    expected = plain_norm_activation(wide, 0.0)
    (slopes,) = torch.autograd.grad(expected, wide, gradient.double())
    given = in_layout(x, layout)
    y = norm_activation(given, 0.0)
    (actual,) = torch.autograd.grad(y, given, gradient)
    assert y.dtype == actual.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)
    away = expected > 1e-4  # from the kink, where rounding decides on which side an element is
    torch.testing.assert_close(actual.double()[away], slopes[away], rtol=0, atol=tolerance)


@layouts
@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalise", [norm_activation, plain_norm_activation])
def test_a_guarded_channel_without_variance_passes_no_gradient(normalise: Any, dtype: torch.dtype, layout: Any) -> None:
    x = features(2, 3, 9, 7, dtype=dtype)
    x[1, 2] = 0.3
    given = in_layout(x, layout)
    gradient = features(2, 3, 9, 7, seed=1, dtype=dtype)
    for twice in (False, True):  # differentiable
        slopes, as_is = (
            torch.autograd.grad(normalise(given, 0.2, guarded=guarded), given, gradient, create_graph=twice)[0].detach()
            for guarded in (True, False)
        )
        assert slopes[1, 2].abs().max() == 0 < as_is[1, 2].abs().max()
        slopes[1, 2] = as_is[1, 2]
        assert torch.equal(slopes, as_is)


@layouts
@pytest.mark.usefixtures("any_device")
def test_the_norm_keeps_one_map_for_the_backward_pass(layout: torch.memory_format) -> None:
    x = in_layout(features(2, 4, 8, 8), layout)
    with saved_for_the_backward_pass() as kept:
        norm_activation(x, 0.0)
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() >= x.numel()] == [x.data_ptr()]


@pytest.mark.parametrize(
    "operator",
    [lambda x: norm_activation(x, 0.2), Pad2d(1), BlurDownsample(2).double(), BlurUpsample(2).double()],
    ids=["norm", "pad", "down", "up"],
)  # fmt: skip
@layouts
@pytest.mark.usefixtures("any_device")
def test_gradients_of_gradients(operator: Any, layout: torch.memory_format) -> None:
    # The Lipschitz penalty on D needs them.
    x = in_layout(features(1, 2, 4, 5), layout)
    assert torch.autograd.gradcheck(operator, x) and torch.autograd.gradgradcheck(operator, x)


@layouts
@pytest.mark.parametrize(("widths", "mode"), [((1, 1, 1, 1), "reflect"), ((1, 2, 3, 4), "reflect"), (1, "replicate")])
def test_padding(layout: torch.memory_format, widths: Any, mode: str) -> None:
    pad, x = Pad2d(widths, mode), in_layout(features(2, 3, 6, 7), layout)
    expected = F.pad(x, pad.widths, mode=mode)
    gradient = features(*expected.shape, seed=1).contiguous(memory_format=layout)
    with saved_for_the_backward_pass() as kept:
        y = pad(x)
    assert torch.equal(y, expected) and y.is_contiguous(memory_format=layout) and not kept
    (actual,), (slopes,) = (torch.autograd.grad(result, x, gradient) for result in (y, expected))
    assert actual.is_contiguous(memory_format=layout)
    torch.testing.assert_close(actual, slopes, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("size", "widths"), [((2, 2), 1), ((4, 5), 3), ((2, 5), (4, 3, 1, 1))])
def test_padding_a_map_that_is_hardly_larger(size: tuple[int, int], widths: Any) -> None:
    pad, x = Pad2d(widths), features(1, 2, *size).requires_grad_()
    y, expected = pad(x), F.pad(x, Pad2d(widths).widths, mode="reflect")
    assert torch.equal(y, expected)
    gradient = features(*y.shape, seed=1)
    (actual,), (slopes,) = (torch.autograd.grad(result, x, gradient) for result in (y, expected))
    torch.testing.assert_close(actual, slopes, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [(1, 5), (5, 1), (3, 3)])
def test_padding_says_what_is_too_small_for_it(size: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError, match=f"a map of {size[1]}x{size[0]} pixels is too small"):
        Pad2d(3 if size == (3, 3) else 1)(features(1, 2, *size))
    with pytest.raises(ValueError, match="only a border of 1"):
        Pad2d(2, "replicate")


@layouts
@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (1, 3, 7, 9)])
def test_resampling(layout: torch.memory_format, size: int, shape: tuple[int, ...]) -> None:
    down, up = BlurDownsample(3, size).double(), BlurUpsample(3, size).double()
    after, odd = size // 2, size % 2
    plain = (
        lambda x: F.conv2d(F.pad(x, (1, after, 1, after), mode="reflect"), down.filt, stride=2, groups=3),
        lambda x: F.conv_transpose2d(F.pad(x, (1,) * 4, mode="replicate"), up.filt, None, 2, 3, odd, 3),
    )
    for fast, reference in zip((down, up), plain, strict=True):
        x = in_layout(features(*shape), layout)
        y, expected = fast(x), reference(x)
        assert y.is_contiguous(memory_format=layout)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=0)
        gradient = features(*y.shape, seed=1)
        (actual,), (slopes,) = (torch.autograd.grad(result, x, gradient) for result in (y, expected))
        torch.testing.assert_close(actual, slopes, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("module", [Pad2d(1), Pad2d(1, "replicate"), BlurDownsample(4), BlurUpsample(4)])
def test_autocast_leaves_bf16_alone(module: nn.Module) -> None:
    x = in_layout(features(2, 4, 8, 8, dtype=torch.bfloat16), torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.dtype == gradient.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x.float()), rtol=1e-2, atol=0)


def weighted(parts: list[Tensor]) -> Tensor:
    """A scalar on which each part has its own effect."""
    return torch.stack([(i + 1) * part.square().sum() for i, part in enumerate(parts)]).sum()


@layouts
@pytest.mark.parametrize("used", [[0], [1], [0, 1]])
def test_a_split_batch_has_the_gradient_of_slices(layout: torch.memory_format, used: list[int]) -> None:
    x = in_layout(features(3, 2, 4, 5), layout)
    (expected,) = torch.autograd.grad(weighted([(x[:1], x[1:])[i] for i in used]), x)
    (actual,) = torch.autograd.grad(weighted([split_batch(x, [1, 2])[i] for i in used]), x)
    assert torch.equal(actual, expected) and actual.is_contiguous(memory_format=layout)


def test_the_fused_adam_takes_the_published_steps() -> None:
    def after_three_steps(fused: bool) -> Tensor:
        weight = nn.Parameter(features(5, 7))
        optimiser = make_optimiser([weight], OptimConfig(lr=0.1, weight_decay=0.01))
        optimiser.param_groups[0]["fused"] = fused
        for seed in range(3):
            weight.grad = features(5, 7, seed=seed)
            optimiser.step()
        return weight.detach()

    torch.testing.assert_close(after_three_steps(True), after_three_steps(False), rtol=1e-12, atol=0)


def test_triton_kernels() -> None:
    pytest.importorskip("triton")
    # In a process of its own: Triton chooses between compiler and interpreter when it is imported.
    check = Path(__file__).with_name("check_norm_triton.py")
    done = subprocess.run([sys.executable, str(check)], env={**os.environ, "TRITON_INTERPRET": "1"}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout


# ---- whole steps -----------------------------------------------------------------------------------------------------


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> tuple[Losses, dict[str, Tensor]]:
    """Losses and gradients in fp32, contiguous, with plain operators."""
    with monkeypatch.context() as patch:
        patch.setattr(norm, "norm_activation", lambda x, slope, **_: plain_norm_activation(x, slope))
        patch.setattr(Pad2d, "forward", lambda self, x: F.pad(x.contiguous(), self.widths, mode=self.mode))
        step = Step(precision="fp32", memory_format="contiguous")
        return step.take(), step.gradients()


@pytest.mark.parametrize(
    ("engine", "of_losses", "of_gradients"),
    [
        ({"precision": "fp32"}, 1e-4, 1e-3),
        ({"precision": "fp32", "memory_format": "contiguous"}, 1e-4, 1e-3),
        ({"precision": "bf16"}, 5e-2, 0.5),  # the plain operators in bf16 are off by 0.42
    ],
)
def test_a_step_has_the_losses_and_gradients_of_the_plain_one(
    reference: tuple[Losses, dict[str, Tensor]], engine: dict[str, Any], of_losses: float, of_gradients: float
) -> None:
    step = Step(**engine)
    losses, gradients = step.take(), step.gradients()
    for name, value in reference[0].items():
        assert losses[name].item() == pytest.approx(value.item(), rel=of_losses, abs=of_losses / 10), name
    for name, expected in reference[1].items():
        error = float((gradients[name] - expected).norm() / expected.norm())
        assert error < of_gradients, (name, error)


def test_an_image_of_one_colour_does_no_harm() -> None:
    """Its gradient is of the usual size: by the formula of instance norm it overflows in bf16, whose features round to
    exact zeros there."""
    step = Step(precision="bf16")
    for _ in range(3):
        step.take(1)
    step.batch.source[:] = torch.tensor([0.004, -0.5, 0.004]).view(3, 1, 1)
    step.take(1)
    assert all(float(gradient.norm()) < 1e3 for gradient in step.gradients().values())


def test_checkpointing_changes_no_bit_and_keeps_less() -> None:
    results, kept = [], []
    for checkpointing in (False, True):
        step = Step(precision="fp32", options={"generator__checkpointing": checkpointing})
        with saved_for_the_backward_pass() as maps:
            step.method.generator(step.batch.source)
        losses = step.take()
        results.append([*losses.values(), *step.gradients().values()])
        kept.append(sum(saved.numel() for saved in maps))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert kept[1] < 0.7 * kept[0]


class Watch(TorchDispatchMode):
    """Counts operators that read or write features in another layout than channels-last, and copies to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.strays: Counter[str] = Counter()
        self.host_reads = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.host_reads += operator is torch.ops.aten._local_scalar_dense.default
        maps = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor) and x.ndim == 4]
        maps = [x for x in maps if x.shape[1] > 3 and x.shape[2] > 4]  # not images, scores and convolutions' weights
        if any(x.stride(1) != 1 for x in maps):
            self.strays[str(operator)] += 1
        return result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_converts_no_layout_and_waits_for_no_result(precision: str) -> None:
    step = Step(precision=precision)
    step.take()
    with Watch() as watch:
        step.take(1)
    # The perturbation is drawn contiguous for each tap but the image's, scaled to its norm, and joins there.
    drawn = {"aten.stack.default", "aten.linalg_vector_norm.default", "aten.div.Tensor", "aten.mul.Tensor"}
    assert watch.strays == dict.fromkeys(["aten.add.Tensor", *drawn], 4)
    # Whether each phase's gradient is finite: on a CPU it costs nothing to know, and on a GPU nobody asks.
    assert watch.host_reads == 2
