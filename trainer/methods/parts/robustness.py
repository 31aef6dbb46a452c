"""L_robust of SRUNIT, and the consistency loss that it is compared with (E5): distances of projected patches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infra.config import option
from infra.errors import UserError
from trainer.losses import consistency_loss, perturbation, robustness_loss
from trainer.methods.base import Batch, StepContext, frozen
from trainer.methods.parts.contrast import PatchContrast
from trainer.methods.parts.part import Outputs, Part, patch_ids
from trainer.networks.heads import sample_patches


@dataclass(frozen=True, kw_only=True)
class RobustConfig:
    """L_robust = 1/K sum_k L_k (SRUNIT, Eqn. 3)."""

    beta: float = option(
        1e-4, "weight of L_robust; 0: without it (the paper tunes it in [1e-5, 1e-3])", flag="--beta", adjustable=True
    )
    T: float = option(
        0.1, "largest norm of the perturbation tau (the paper tunes it in [0.01, 0.2])", flag="--T", adjustable=True
    )
    least: float = option(
        1e-7, "smallest norm of tau, which the distance is divided by (docs/flipping.md)", adjustable=True
    )
    taps: tuple[int, ...] = option((), "the K layers that are perturbed; none given: all of method.taps")
    per_step: str = option("all", "perturb all taps in each step, or one at random", choices=("all", "one"))
    rule: str = option(
        "paper", "norm of tau: drawn from [least, T], or always T as the published code has it",
        choices=("paper", "published"),
    )  # fmt: skip
    start: float = option(0.25, "share of all epochs before L_robust begins")
    gradient: str = option(
        "both", "networks that L_robust trains: G and its heads, or G alone", choices=("both", "generator")
    )
    semantics: str = option(
        "heads", "what is compared: features projected by the heads F_k, or as they are (E3)",
        choices=("heads", "features"),
    )  # fmt: skip
    reference: str = option(
        "source", "what the perturbed translation is compared with: the source (Eqn. 3), or its translation (Eqn. 4, E4)",
        choices=("source", "translation"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise UserError(f"beta = {self.beta} is negative: give 0 (no L_robust) or a positive weight such as 1e-4")
        if not 0 < self.least < self.T:
            raise UserError(f"norms of a perturbation from {self.least} to T = {self.T} are impossible: "
                            "give a least above 0 and below T, such as 1e-7 and 0.1")  # fmt: skip
        if not 0 <= self.start <= 1:
            raise UserError(f"method.robust.start = {self.start} is a share of the epochs: give a number from 0 to 1")
        if len(set(self.taps)) < len(self.taps):
            raise UserError(f"robust taps {', '.join(map(str, self.taps))} name one twice: name each tap once")


class Robustness(Part):
    name = "robust"
    starts_at = "method.robust.start"

    def __init__(self, config: RobustConfig, contrast: PatchContrast) -> None:
        super().__init__(config.beta, config.start)
        self.config, self.generator, self.heads = config, contrast.generator, contrast.heads
        self.all_taps, self.patches = contrast.config.taps, contrast.config.patches

    def value(self, outputs: Outputs, batch: Batch, context: StepContext) -> Tensor:
        """Over the taps of this step, divided by the number of all K taps, as Eqn. 3 and the published code."""
        config, own_taps = self.config, self.config.taps or self.all_taps
        rule: Any = config.rule
        one = config.per_step == "one"
        taps = (own_taps[int(context.draws.stream("robust", "choice").integers(len(own_taps)))],) if one else own_taps
        heads = [self.all_taps.index(tap) for tap in taps]
        clean = [outputs.source_features[head] for head in heads]
        taus, magnitudes = zip(
            *(
                perturbation(*noise(tap, feature, batch, context), config.T, rule, config.least)
                for tap, feature in zip(taps, clean, strict=True)
            ),
            strict=True,
        )
        perturbed = self.generator.perturbed_features([f + tau for f, tau in zip(clean, taus, strict=True)], taps)

        reference = clean if config.reference == "source" else self.generator.encode(outputs.fake, taps)
        ids = patch_ids(clean, taps, self.patches, "robust", context)
        rows = self._semantics([*reference, *perturbed], [*ids, *ids], [*heads, *heads])
        count = len(taps)
        terms = [robustness_loss(rows[k], rows[count + k], magnitudes[k], ids[k]) for k in range(count)]
        return torch.stack(terms).sum() / len(own_taps)

    def _semantics(self, features: Sequence[Tensor], ids: Sequence[Tensor], heads: Sequence[int]) -> list[Tensor]:
        """The patches that are compared, (B * n, dim) for each feature map, float32 or wider."""
        if self.config.semantics == "features":
            rows = [sample_patches(*pair) for pair in zip(features, ids, strict=True)]
            return [row.to(torch.promote_types(row.dtype, torch.float32)) for row in rows]
        if self.config.gradient == "generator":
            return frozen(self.heads, features, ids, heads)
        return self.heads(features, ids, heads)


def noise(tap: int, feature: Tensor, batch: Batch, context: StepContext) -> tuple[Tensor, Tensor]:
    """The raw draws of tau_k for features (b, c, h, w), one stream for each slot of the global batch: normal (b, c, h, w)
    and uniform (b, 1, h, w), float32 (float64 for float64 features), on the features' device."""
    channels, height, width = feature.shape[1:]
    dtype = torch.float64 if feature.dtype == torch.float64 else torch.float32
    normals, uniforms = [], []
    for stream in context.draws.per_slot(batch.slots, "tau", tap, device=feature.device):
        normals.append(stream.normal(channels, height, width, dtype=dtype))
        uniforms.append(stream.uniform(1, height, width, dtype=dtype))
    return torch.stack(normals), torch.stack(uniforms)


class Consistency(Part):
    """L^sc, the mean over all taps."""

    name = "consistency"
    starts_at = "method.constraint.start"

    def __init__(self, weight: float, start: float, contrast: PatchContrast) -> None:
        super().__init__(weight, start)
        self.contrast = contrast

    def value(self, outputs: Outputs, batch: Batch, context: StepContext) -> Tensor:
        contrast, sources = self.contrast, outputs.source_features
        taps = contrast.config.taps
        ids = patch_ids(sources, taps, contrast.config.patches, "consistency", context)
        translated = contrast.generator.encode(outputs.fake, taps)
        rows = contrast.heads([*sources, *translated], [*ids, *ids], [*range(len(taps))] * 2)
        pairs = zip(rows[: len(taps)], rows[len(taps) :], strict=True)
        return torch.stack([consistency_loss(source, translated) for source, translated in pairs]).mean()
