"""L_robust of SRUNIT, and the consistency loss that it is compared with (E5): distances of projected patches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infra.config import option
from infra.errors import UserError
from trainer.losses import consistency_loss, mean_inverse, perturbation, relative_perturbation, robustness_loss
from trainer.methods.base import Batch, StepContext, frozen
from trainer.methods.parts.contrast import PatchContrast
from trainer.methods.parts.part import Outputs, Part, patch_ids
from trainer.networks.heads import sample_patches


@dataclass(frozen=True, kw_only=True)
class RobustConfig:
    """L_robust = 1/K sum_k L_k (SRUNIT, Eqn. 3).

    rule relative is this project's: |tau_k| = r |f_k| at each pixel, and L_k = |sg(F_k(G(x))) - F_k(G(x + tau_k))| / r, where
    sg lets no gradient through. Both sides come together as r vanishes, so no drawn r gives a loss without bound.
    """

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
        "paper", "norm of tau: drawn from [least, T]; always T, divided by such a draw all the same (published code); or "
        "relative: a share of the features' own norm at each pixel", choices=("paper", "published", "relative"),
    )  # fmt: skip
    least_relative: float = option(0.05, "rule relative: smallest share of the features' norm")
    most_relative: float = option(0.5, "rule relative: largest share of the features' norm")
    start: float = option(0.25, "share of all epochs before L_robust begins")
    rest: bool = option(
        False, "update neither G nor its heads before method.robust.start, with L_robust or without (published code)"
    )
    gradient: str = option(
        "both", "networks that L_robust trains: G and its heads, or G alone", choices=("both", "generator")
    )
    semantics: str = option(
        "heads", "what is compared: features projected by the heads F_k, or as they are (E3)",
        choices=("heads", "features"),
    )  # fmt: skip
    reference: str = option(
        "source", "what the perturbed translation is compared with: the source (Eqn. 3), or its translation (Eqn. 4, E4); "
        "rule relative takes the translation and holds it constant", choices=("source", "translation"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise UserError(f"beta = {self.beta} is negative: give 0 (no L_robust) or a positive weight such as 1e-4")
        if not 0 < self.least < self.T:
            raise UserError(f"norms of a perturbation from {self.least} to T = {self.T} are impossible: "
                            "give a least above 0 and below T, such as 1e-7 and 0.1")  # fmt: skip
        if not 0 < self.least_relative < self.most_relative:
            raise UserError(f"perturbations from {self.least_relative} to {self.most_relative} of the features' norm are "
                            "impossible: give a method.robust.least_relative above 0 and below most_relative, such as 0.05 "
                            "and 0.5")  # fmt: skip
        if not 0 <= self.start <= 1:
            raise UserError(f"method.robust.start = {self.start} is a share of the epochs: give a number from 0 to 1")
        if self.rest and self.start == 1:
            raise UserError("method.robust.rest keeps G at rest until method.robust.start = 1, which is never reached: "
                            "give a start below 1, such as 0.25")  # fmt: skip
        if len(set(self.taps)) < len(self.taps):
            raise UserError(f"robust taps {', '.join(map(str, self.taps))} name one twice: name each tap once")


class Robustness(Part):
    name = "robust"
    starts_at = "method.robust.start"

    def __init__(self, config: RobustConfig, contrast: PatchContrast) -> None:
        super().__init__(config.beta, config.start)
        self.config, self.generator, self.heads = config, contrast.generator, contrast.heads
        self.all_taps, self.patches = contrast.config.taps, contrast.config.patches
        self.own_taps = config.taps or self.all_taps

    @property
    def effective_weight(self) -> float:
        """What the distance of two projected patches weighs in G's loss, on average over the draws:
        beta E[1/norm] (taps per step) / K, and E[1/r] for rule relative."""
        return self.weight * self._mean_inverse * self._per_step / len(self.own_taps)

    @property
    def _per_step(self) -> int:
        return 1 if self.config.per_step == "one" else len(self.own_taps)

    @property
    def _mean_inverse(self) -> float:
        config = self.config
        ends = (config.least_relative, config.most_relative) if config.rule == "relative" else (config.least, config.T)
        return mean_inverse(*ends)

    def note(self) -> str:
        divisor = "r" if self.config.rule == "relative" else "norm"
        return (
            f"L_robust: effective weight {self.effective_weight:.3g} (beta {self.weight:g} x E[1/{divisor}] "
            f"{self._mean_inverse:.4g} x {self._per_step} of {len(self.own_taps)} taps per step)"
        )

    def value(self, outputs: Outputs, batch: Batch, context: StepContext) -> Tensor:
        """Over the taps of this step, divided by the number of all K taps, as Eqn. 3 and the published code."""
        config, own_taps = self.config, self.own_taps
        one = config.per_step == "one"
        taps = (own_taps[context.draws.choice(len(own_taps), "robust", "choice")],) if one else own_taps
        heads = [self.all_taps.index(tap) for tap in taps]
        clean = [outputs.source_features[head] for head in heads]
        taus, magnitudes = zip(
            *(
                self._perturbation(feature, *noise(tap, feature, batch, context))
                for tap, feature in zip(taps, clean, strict=True)
            ),
            strict=True,
        )
        perturbed = self.generator.perturbed_features([f + tau for f, tau in zip(clean, taus, strict=True)], taps)

        ids = patch_ids(clean, taps, self.patches, "robust", context)
        rows = self._semantics([*self._reference(clean, outputs, taps), *perturbed], [*ids, *ids], [*heads, *heads])
        count = len(taps)
        if config.rule == "relative":
            rows[:count] = [row.detach() for row in rows[:count]]
        terms = [robustness_loss(rows[k], rows[count + k], magnitudes[k], ids[k]) for k in range(count)]
        return torch.stack(terms).sum() / len(own_taps)

    def _perturbation(self, feature: Tensor, normal: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """tau of a feature map, and what its distance is divided by."""
        config = self.config
        if config.rule == "relative":
            return relative_perturbation(normal, uniform, feature, config.least_relative, config.most_relative)
        return perturbation(normal, uniform, config.T, config.rule, config.least)

    def _reference(self, clean: Sequence[Tensor], outputs: Outputs, taps: Sequence[int]) -> Sequence[Tensor]:
        """The feature maps that those of the perturbed translation are compared with."""
        if self.config.rule == "relative":
            with torch.no_grad():
                return self.generator.encode(outputs.fake, taps)
        return clean if self.config.reference == "source" else self.generator.encode(outputs.fake, taps)

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
