"""CUT, FastCUT and SRUNIT: one method. FastCUT is CUT with other options, SRUNIT is CUT plus L_robust.

CUT: Park et al. 2020, "Contrastive Learning for Unpaired Image-to-Image Translation".
SRUNIT: Jia et al. 2021, "Semantically Robust Unpaired Image Translation for Data with Unmatched Semantics Statistics".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from infra.config import option
from infra.errors import UserError
from trainer.draws import generator
from trainer.image_buffer import ImageBuffer
from trainer.losses import adversarial_loss, patch_nce, perturbation, robustness_loss
from trainer.methods.base import Batch, Losses, Method, StepContext, frozen
from trainer.networks import ProjectionHeads, init_weights
from trainer.networks.config import ModelConfig

# The padded input, the two down-sampling convolutions, the first and the fifth residual block (CUT, Appendix C.1).
PAPER_TAPS = (0, 4, 8, 12, 16)


@dataclass(frozen=True, kw_only=True)
class RobustConfig:
    """L_robust = 1/K sum_k L_k (SRUNIT, Eqn. 3)."""

    beta: float = option(1e-4, "weight of L_robust; 0: without it (the paper tunes it in [1e-5, 1e-3])", flag="--beta")
    T: float = option(0.1, "largest norm of the perturbation tau (the paper tunes it in [0.01, 0.2])", flag="--T")
    taps: tuple[int, ...] = option((), "the K layers that are perturbed; none given: all of method.taps")
    per_step: str = option("all", "perturb all taps in each step, or one at random", choices=("all", "one"))
    rule: str = option(
        "paper", "norm of tau: drawn from [1e-7, T], or always T as the published code has it",
        choices=("paper", "published"),
    )  # fmt: skip
    start: float = option(0.25, "share of all epochs before L_robust begins")
    gradient: str = option(
        "both", "networks that L_robust trains: G and its heads, or G alone", choices=("both", "generator")
    )

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise UserError(f"beta = {self.beta} is negative: give 0 (no L_robust) or a positive weight such as 1e-4")
        if self.T <= 1e-7:
            raise UserError(f"T = {self.T} leaves no room for a perturbation: give more than 1e-7, such as 0.1")
        if not 0 <= self.start <= 1:
            raise UserError(f"method.robust.start = {self.start} is a share of the epochs: give a number from 0 to 1")
        if len(set(self.taps)) < len(self.taps):
            raise UserError(f"robust taps {', '.join(map(str, self.taps))} name one twice: name each tap once")


@dataclass(frozen=True, kw_only=True)
class CutConfig:
    name: str = option("srunit", "preset of the options below", flag="--method", choices=("cut", "fastcut", "srunit"))
    gan: str = option("lsgan", "adversarial loss", choices=("lsgan", "vanilla", "nonsaturating"))
    lambda_gan: float = option(1.0, "weight of the adversarial loss of G")
    lambda_nce: float = option(1.0, "weight of PatchNCE")
    taps: tuple[int, ...] = option(PAPER_TAPS, "layers of G whose patches are contrasted")
    patches: int = option(256, "patches per image and layer")
    temperature: float = option(0.07, "temperature of PatchNCE")
    all_negatives: bool = option(False, "negatives from the whole global batch, not only from the same image")
    identity: bool = option(True, "PatchNCE on target images too, which G should leave as they are")
    flip_equivariance: bool = option(False, "mirror half of G's inputs, and the features of its output back")
    buffer: int = option(50, "images kept to show D earlier translations; 0: none")
    normalisation: str = option("srunit", "epsilon of the heads' normalisation", choices=("cut", "srunit"))
    robust: RobustConfig = field(default_factory=RobustConfig)

    def __post_init__(self) -> None:
        if self.lambda_nce <= 0 or self.lambda_gan < 0:
            raise UserError("lambda_nce must be positive (PatchNCE trains the heads) and lambda_gan not negative")
        if self.temperature <= 0 or self.patches < 2:
            raise UserError("method.temperature must be positive, and method.patches 2 or more")
        if self.buffer < 0:
            raise UserError(f"method.buffer = {self.buffer} counts images: give 0 or more")
        if not self.taps:
            raise UserError("method.taps is empty: name layers of the generator such as 0,4,8,12,16")
        strangers = set(self.robust.taps) - set(self.taps)
        if strangers:
            raise UserError(f"robust tap {min(strangers)} has no projection head: choose taps among "
                            f"{', '.join(map(str, self.taps))}, or add it to method.taps")  # fmt: skip

    @property
    def robust_taps(self) -> tuple[int, ...]:
        return self.robust.taps or self.taps


@dataclass
class CutOutputs:
    """fake, identity: G of the source and of the target (identity None if not asked for), (b, 3, h, w).
    source_features, target_features: G's features of both at the taps; flipped: the inputs were mirrored."""

    fake: Tensor
    identity: Tensor | None
    source_features: list[Tensor]
    target_features: list[Tensor] | None
    flipped: bool


class Cut(Method[Batch, CutOutputs]):
    """networks: generator, discriminator and heads (the F_k). global_batch sets the size of each slot's image buffer,
    so that all of them together keep `config.buffer` images (at least one each)."""

    phases = ("discriminator", "generator")  # in the order of CUT's published step
    product_name = "generator"

    def __init__(self, config: CutConfig, model: ModelConfig, *, seed: int, global_batch: int) -> None:
        super().__init__()
        self.config = config
        self.generator = model.generator()
        self.discriminator = model.discriminator()
        normalisation: Any = config.normalisation
        self.heads = ProjectionHeads(self.generator.tap_channels(config.taps), model.head_dim, normalisation)
        for name in ("generator", "discriminator", "heads"):
            init_weights(getattr(self, name), generator("cpu", seed, "init", name))
        self._capacity = -(-config.buffer // global_batch)
        self._image_buffers: dict[int, ImageBuffer] = {}  # of the slots that this rank has met
        self._restored: dict[str, Tensor] = {}  # of all slots, from a checkpoint

    def networks(self, phase: str) -> nn.ModuleDict:
        names = {"discriminator": ("discriminator",), "generator": ("generator", "heads")}[phase]
        return nn.ModuleDict({name: getattr(self, name) for name in names})

    # ---- the three functions of the game ----------------------------------------------------------------------------

    def forward(self, batch: Batch, context: StepContext) -> CutOutputs:
        flipped = self.config.flip_equivariance and context.draws.coin("flip")
        images = torch.cat([batch.source, batch.target]) if self.config.identity else batch.source
        images = images.flip(3) if flipped else images
        translated, features = self.generator.forward_with_features(images, self.config.taps)
        pairs = len(batch.source)
        return CutOutputs(
            fake=translated[:pairs],
            identity=translated[pairs:] if self.config.identity else None,
            source_features=[feature[:pairs] for feature in features],
            target_features=[feature[pairs:] for feature in features] if self.config.identity else None,
            flipped=flipped,
        )

    def loss(self, phase: str, outputs: CutOutputs, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        evaluate = {"discriminator": self.discriminator_loss, "generator": self.generator_loss}[phase]
        return evaluate(outputs, batch, context)

    def discriminator_loss(self, outputs: CutOutputs, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        fake = self._buffered(outputs.fake.detach(), batch.slots, context)
        score_fake, score_real = self.discriminator(torch.cat([fake, batch.target])).chunk(2)
        d_fake, d_real = self._gan(score_fake, False), self._gan(score_real, True)
        return (d_fake + d_real) / 2, _reported(D_fake=d_fake, D_real=d_real)

    def generator_loss(self, outputs: CutOutputs, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        config = self.config
        g_gan = self._gan(frozen(self.discriminator, outputs.fake), True) * config.lambda_gan
        nce, nce_identity = self._contrast(outputs, batch, context)
        total = g_gan + (nce if nce_identity is None else (nce + nce_identity) / 2)
        named = {"G_GAN": g_gan, "G": total, "NCE": nce}
        if nce_identity is not None:
            named["NCE_Y"] = nce_identity
        if config.robust.beta > 0 and context.progress >= config.robust.start:
            named["robust"] = self._robustness(outputs, batch, context)
            total = total + config.robust.beta * named["robust"]
        return total, _reported(**named)

    # ---- the adversarial part ---------------------------------------------------------------------------------------

    def _gan(self, score: Tensor, real: bool) -> Tensor:
        kind: Any = self.config.gan
        return adversarial_loss(kind, score, real)

    def _buffered(self, fake: Tensor, slots: Tensor, context: StepContext) -> Tensor:
        if not self._capacity:
            return fake
        seen = []
        for image, slot in zip(fake, slots.tolist(), strict=True):
            buffer = self._image_buffer(slot, image.device)
            seen.append(buffer.query(image, *context.draws.buffer(slot, self._capacity)))
        return torch.stack(seen)

    def _image_buffer(self, slot: int, device: torch.device) -> ImageBuffer:
        if slot not in self._image_buffers:
            self._image_buffers[slot] = ImageBuffer(self._capacity)
            if (images := self._restored.get(_slot_name(slot))) is not None:
                self._image_buffers[slot].load_state_dict({"images": images.to(device)})
        return self._image_buffers[slot]

    def slot_state(self) -> dict[str, Tensor]:
        return {_slot_name(slot): buffer.state_dict()["images"] for slot, buffer in self._image_buffers.items()}

    def load_slot_state(self, state: dict[str, Tensor]) -> None:
        # A rank takes a slot's images when it first meets the slot, so that it never reports those of other ranks.
        self._image_buffers, self._restored = {}, state

    # ---- the contrastive part ---------------------------------------------------------------------------------------

    def _contrast(self, outputs: CutOutputs, batch: Batch, context: StepContext) -> tuple[Tensor, Tensor | None]:
        """PatchNCE between source and translation, and between target and its identity translation if asked for."""
        made = outputs.fake if outputs.identity is None else torch.cat([outputs.fake, outputs.identity])
        queries = self.generator.encode(made, self.config.taps)
        keys, keys_identity = outputs.source_features, outputs.target_features
        if outputs.flipped:
            # The features kept are those of mirrored images; a key is encoded from the image as it was.
            queries = [query.flip(3) for query in queries]
            with torch.no_grad():
                keys = self.generator.encode(batch.source, self.config.taps)
                keys_identity = self.generator.encode(batch.target, self.config.taps) if keys_identity else None
        pairs = len(batch.source)
        nce = self._nce([query[:pairs] for query in queries], keys, "nce", context)
        if keys_identity is None:
            return nce, None
        return nce, self._nce([query[pairs:] for query in queries], keys_identity, "identity", context)

    def _nce(self, queries: Sequence[Tensor], keys: Sequence[Tensor], stream: str, context: StepContext) -> Tensor:
        """The mean over taps and patches, times its weight. No gradient flows to the keys, so their heads need none."""
        config, images = self.config, len(queries[0])
        ids = self._patch_ids(queries, config.taps, stream, context)
        query_rows = self.heads(queries, ids)
        with torch.no_grad():
            key_rows = self.heads(keys, ids)
        losses = []
        for query, key in zip(query_rows, key_rows, strict=True):
            key, first = context.all_ranks(key) if config.all_negatives else (key, 0)
            groups = 1 if config.all_negatives else images
            losses.append(patch_nce(query, key, groups, config.temperature, first).mean())
        return torch.stack(losses).mean() * config.lambda_nce

    def _patch_ids(
        self, features: Sequence[Tensor], taps: Sequence[int], stream: str, context: StepContext
    ) -> list[Tensor]:
        ids = [
            context.draws.patch_ids(stream, tap, feature.shape[2] * feature.shape[3], self.config.patches)
            for tap, feature in zip(taps, features, strict=True)
        ]
        return [each.to(features[0].device, non_blocking=True) for each in ids]

    # ---- the robustness part ----------------------------------------------------------------------------------------

    def _robustness(self, outputs: CutOutputs, batch: Batch, context: StepContext) -> Tensor:
        """L_robust over the taps of this step, divided by the number of all K taps, as Eqn. 3 and the published code."""
        config, all_taps = self.config.robust, self.config.robust_taps
        rule: Any = config.rule
        taps = all_taps if config.per_step == "all" else (all_taps[context.draws.choice("robust", len(all_taps))],)
        heads = [self.config.taps.index(tap) for tap in taps]
        clean = [outputs.source_features[head] for head in heads]
        taus, magnitudes = zip(
            *(
                perturbation(*context.draws.noise(tap, batch.slots, feature), config.T, rule)
                for tap, feature in zip(taps, clean, strict=True)
            ),
            strict=True,
        )
        perturbed = self.generator.perturbed_features([f + tau for f, tau in zip(clean, taus, strict=True)], taps)

        ids = self._patch_ids(clean, taps, "robust", context)
        project = self.heads if config.gradient == "both" else lambda *inputs: frozen(self.heads, *inputs)
        rows = project([*clean, *perturbed], [*ids, *ids], [*heads, *heads])
        count = len(taps)
        terms = [robustness_loss(rows[k], rows[count + k], magnitudes[k], ids[k]) for k in range(count)]
        return torch.stack(terms).sum() / len(all_taps)


def _slot_name(slot: int) -> str:
    return f"buffer/{slot}"


def _reported(**losses: Tensor) -> Losses:
    return {name: loss.detach() for name, loss in losses.items()}
