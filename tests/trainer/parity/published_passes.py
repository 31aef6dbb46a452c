"""The method with the passes of the published code, to replay recordings of it exactly, a fault of torch included.

On a CPU, torch's instance norm returns wrong gradients for a batch of one image whose gradient arrives in
channels-last order (see trainer/networks/norm.py, which mends it). The published code runs one image at a time and
gathers pixels through a permuted view, so its recordings at batch size 1 hold such gradients. They can be replayed only
by running the same passes with the same memory layouts and without the mend, which is what this module arranges; the
networks, heads, losses, optimiser and order of the step are the project's own.
"""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.methods import Cut, Srunit, cut
from trainer.methods.base import Batch, Losses, StepContext
from trainer.methods.parts import contrast
from trainer.methods.parts.contrast import Contrast
from trainer.methods.parts.part import Outputs
from trainer.networks import ResnetGenerator, heads, norm, padding, resample


def stock_norm_is_wrong() -> bool:
    """Whether this torch has the fault."""
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    y = F.instance_norm(x)
    gradient = torch.randn_like(y)
    (right,) = torch.autograd.grad(y, x, gradient, retain_graph=True)
    (other,) = torch.autograd.grad(y, x, gradient.contiguous(memory_format=torch.channels_last))
    return not torch.allclose(right, other)


def unmend(patch: pytest.MonkeyPatch) -> None:
    """Bring torch's fault back, and the operators that pass the layouts of gradients on to it as the published ones do."""

    activations: dict[float, Callable[[Tensor], Tensor]] = {
        1.0: torch.nn.Identity(), 0.0: F.relu, 0.2: partial(F.leaky_relu, negative_slope=0.2),
    }  # fmt: skip

    def stock_norm(self: norm.InstanceNorm2d, x: Tensor) -> Tensor:
        return activations[self.slope](F.instance_norm(x))

    def stock_pad(self: padding.Pad2d, x: Tensor) -> Tensor:
        return F.pad(x, self.widths, mode=self.mode)

    def stock_blur(x: Tensor, filt: Tensor, padding: int, stride: int) -> Tensor:
        return F.conv2d(x, filt, stride=stride, padding=padding, groups=x.shape[1])

    def stock_spread(x: Tensor, filt: Tensor, padding: int, output_padding: tuple[int, int]) -> Tensor:
        return F.conv_transpose2d(x, filt, stride=2, padding=padding, output_padding=output_padding, groups=x.shape[1])

    def slices(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        return x[: sizes[0]], x[sizes[0] :]

    def sample_patches(feature: Tensor, ids: Tensor) -> Tensor:
        return feature.permute(0, 2, 3, 1).flatten(1, 2)[:, ids].flatten(0, 1)

    def one_by_one(self: ResnetGenerator, perturbed: Sequence[Tensor], taps: Sequence[int]) -> list[Tensor]:
        return [
            self.encode(self.model[tap + 1 :](feature), [tap])[0] for feature, tap in zip(perturbed, taps, strict=True)
        ]

    patch.setattr(norm.InstanceNorm2d, "forward", stock_norm)
    patch.setattr(padding.Pad2d, "forward", stock_pad)
    patch.setattr(resample._Blur, "apply", stock_blur)
    patch.setattr(resample._Spread, "apply", stock_spread)
    for module in (cut, contrast):
        patch.setattr(module, "split_batch", slices)
    patch.setattr(heads, "sample_patches", sample_patches)
    patch.setattr(ResnetGenerator, "perturbed_features", one_by_one)


def publish(method: Cut) -> None:
    """Have a method take the passes of the published code: source and target are encoded apart, in SRUNIT's code also
    translated apart, and where L_robust trains G alone its gradient travels in a backward of its own."""
    method.contrast.__class__ = PublishedContrast
    if isinstance(method, Srunit):
        method.__class__ = PublishedSrunit


class PublishedContrast(Contrast):
    def values(self, outputs: Outputs, batch: Batch, context: StepContext) -> tuple[Tensor, Tensor | None]:
        def nce(made: Tensor, original: Tensor, stream: str) -> Tensor:
            queries = self.generator.encode(made, self.config.taps)
            queries = [query.flip(3) for query in queries] if outputs.flipped else queries
            with torch.no_grad():
                keys = self.generator.encode(original, self.config.taps)
            return self._nce(queries, keys, stream, context)

        identity = None
        if outputs.identity is not None:
            identity = nce(outputs.identity, batch.target, "identity")
        return nce(outputs.fake, batch.source, "nce"), identity


class PublishedSrunit(Srunit):
    def forward(self, batch: Batch, context: StepContext, name: str = "translate") -> Outputs:
        fake, source_features = self.generator.forward_with_features(batch.source, self.config.taps)
        identity, target_features = self.generator.forward_with_features(batch.target, self.config.taps)
        return Outputs(fake, identity, source_features, target_features, flipped=False)

    def loss(self, phase: str, outputs: Outputs, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        if phase != "generator" or self.config.robust.gradient == "both" or not self.parts:
            return super().loss(phase, outputs, batch, context)
        (robust,) = self.parts
        loss, named = super().generator_loss(outputs, batch, context)
        loss.backward(retain_graph=True)
        term = robust.value(outputs, batch, context)
        return robust.weight * term, {name: value.detach() for name, value in (named | {"robust": term}).items()}
