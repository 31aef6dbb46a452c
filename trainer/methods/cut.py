"""CUT, FastCUT and SRUNIT: one method. FastCUT is CUT with other options, SRUNIT is CUT plus L_robust.

CUT: Park et al. 2020, "Contrastive Learning for Unpaired Image-to-Image Translation".
SRUNIT: Jia et al. 2021, "Semantically Robust Unpaired Image Translation for Data with Unmatched Semantics Statistics".
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.draws import generator
from trainer.image_buffer import ImageBuffer
from trainer.losses import (
    adversarial_loss,
    consistency_loss,
    gradient_norms,
    patch_nce,
    perturbation,
    robustness_loss,
    self_distance_loss,
    self_distances,
    smoothness_loss,
)
from trainer.losses.constraints import PATCH_SIZE
from trainer.methods.base import Batch, Losses, Method, StepContext, frozen
from trainer.methods.config import CutConfig
from trainer.methods.memory import MemoryBank, RunningMoments
from trainer.networks import ProjectionHeads, init_weights
from trainer.networks.config import ModelConfig
from trainer.networks.generator import ResnetBlock
from trainer.networks.heads import sample_patches
from trainer.networks.sizes import Sizes
from trainer.networks.split import split_batch


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
        if config.separate_encoder:
            self.output_encoder, self.output_heads = self.generator.encoder(config.taps), copy.deepcopy(self.heads)
            for name in ("output_encoder", "output_heads"):
                init_weights(getattr(self, name), generator("cpu", seed, "init", name))
        self.distances = RunningMoments(2) if config.constraint.self_distance > 0 else None
        self.bank: MemoryBank | None = None
        if config.bank.size > 0:
            self.bank = MemoryBank(
                config.bank, self.generator.encoder(config.taps), self.heads, taps=config.taps, dim=model.head_dim,
                streams=("nce", "identity") if config.identity else ("nce",), seed=seed,
            )  # fmt: skip
        self._capacity = -(-config.buffer // global_batch)
        self._image_buffers: dict[int, ImageBuffer] = {}  # of the slots that this rank has met
        self._restored: dict[str, Tensor] = {}  # of all slots, from a checkpoint

    def networks(self, phase: str) -> nn.ModuleDict:
        names = {"discriminator": ["discriminator"], "generator": ["generator", "heads"]}[phase]
        if phase == "generator" and self.config.separate_encoder:
            names += ["output_encoder", "output_heads"]
        return nn.ModuleDict({name: getattr(self, name) for name in names})

    def sizes(self, images: int) -> Sizes:
        taken = self.generator.sizes & self.discriminator.sizes
        if self.config.constraint.smoothness > 0:
            taken &= Sizes(smallest=PATCH_SIZE + 1)  # for two patches to compare
        return taken

    def compiled_parts(self) -> list[nn.Module]:
        parts: list[nn.Module] = [layer for layer in self.generator.model if isinstance(layer, ResnetBlock)]
        # The Lipschitz penalty needs the gradient of D's gradient, which compiled code has not.
        return parts if self.config.constraint.lipschitz > 0 else [*parts, self.discriminator]

    def memory(self) -> nn.ModuleDict:
        held = {"bank": self.bank, "distances": self.distances}
        return nn.ModuleDict({name: module for name, module in held.items() if module is not None})

    def late_losses(self) -> dict[str, float]:
        robust, constraint = self.config.robust, self.config.constraint
        weights = (constraint.self_distance, constraint.smoothness, constraint.consistency, constraint.lipschitz)
        starts = {
            "method.robust.start": (robust.beta, robust.start),
            "method.constraint.start": (max(weights), constraint.start),
        }
        return {option: start for option, (weight, start) in starts.items() if weight > 0}

    # ---- the three functions of the game ----------------------------------------------------------------------------

    def forward(self, batch: Batch, context: StepContext) -> CutOutputs:
        flipped = self.config.flip_equivariance and context.draws.coin("flip")
        images = torch.cat([batch.source, batch.target]) if self.config.identity else batch.source
        images = images.flip(3) if flipped else images
        translated, features = self.generator.forward_with_features(images, self.config.taps)
        if not self.config.identity:
            return CutOutputs(translated, None, features, None, flipped)
        domains = [len(batch.source), len(batch.target)]
        fake, identity = split_batch(translated, domains)
        of_source, of_target = zip(*(split_batch(feature, domains) for feature in features), strict=True)
        return CutOutputs(fake, identity, list(of_source), list(of_target), flipped)

    def loss(self, phase: str, outputs: CutOutputs, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        evaluate = {"discriminator": self.discriminator_loss, "generator": self.generator_loss}[phase]
        return evaluate(outputs, batch, context)

    def discriminator_loss(self, outputs: CutOutputs, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        fake = self._buffered(outputs.fake.detach(), batch.slots, context)
        score_fake, score_real = self.discriminator(torch.cat([fake, batch.target])).chunk(2)
        d_fake, d_real = self._gan(score_fake, False), self._gan(score_real, True)
        total, named = (d_fake + d_real) / 2, {"D_fake": d_fake, "D_real": d_real}
        constraint = self.config.constraint
        if constraint.lipschitz > 0 and context.progress >= constraint.start:
            at_source, at_fake = gradient_norms(self.discriminator, torch.cat([batch.source, fake])).chunk(2)
            named["lipschitz"] = at_source.mean() + at_fake.mean()
            total = total + constraint.lipschitz * named["lipschitz"]
        return total, _reported(**named)

    def generator_loss(self, outputs: CutOutputs, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        config = self.config
        g_gan = self._gan(frozen(self.discriminator, outputs.fake), True) * config.lambda_gan
        nce, nce_identity = self._contrast(outputs, batch, context)
        total = g_gan + (nce if nce_identity is None else (nce + nce_identity) / 2)
        named = {"G_GAN": g_gan, "G": total, "NCE": nce}
        if nce_identity is not None:
            named["NCE_Y"] = nce_identity
        for name, weight, term in self._constraints(outputs, batch, context):
            named[name] = term
            total = total + weight * term
        return total, _reported(**named)

    def after_step(self, batches: Sequence[Batch], context: StepContext) -> None:
        if self.distances is not None and context.progress < self.config.constraint.start:
            for batch in batches:
                pair = torch.stack([self_distances(batch.source), self_distances(batch.target)], dim=1)
                self.distances.add(context.all_ranks(pair)[0])
        if self.bank is not None:
            self.bank.follow(self.generator, self.heads)
            for batch in batches:
                for stream in self.bank.streams:
                    images = batch.source if stream == "nce" else batch.target
                    self._remember(self.bank, stream, images, context)

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
        return torch.stack(seen, out=torch.empty_like(fake))  # in the layout of fake

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
        encoder = self.output_encoder if self.config.separate_encoder else self.generator
        queries = encoder.encode(made if self.config.decoder_nce else made.detach(), self.config.taps)
        keys, keys_identity = outputs.source_features, outputs.target_features
        if outputs.flipped:
            # The features kept are those of mirrored images; a key is encoded from the image as it was.
            queries = [query.flip(3) for query in queries]
            with self._keys_learn():
                keys = self.generator.encode(batch.source, self.config.taps)
                keys_identity = self.generator.encode(batch.target, self.config.taps) if keys_identity else None
        if keys_identity is None:
            return self._nce(queries, keys, "nce", context), None
        domains = [len(batch.source), len(batch.target)]
        of_fake, of_identity = zip(*(split_batch(query, domains) for query in queries), strict=True)
        nce = self._nce(of_fake, keys, "nce", context)
        return nce, self._nce(of_identity, keys_identity, "identity", context)

    def _keys_learn(self) -> torch.set_grad_enabled:
        """Where encoder and heads are shared they learn from the queries. Those that see source images alone would
        learn nothing, so there the keys teach them."""
        return torch.set_grad_enabled(self.config.separate_encoder)

    def _nce(self, queries: Sequence[Tensor], keys: Sequence[Tensor], stream: str, context: StepContext) -> Tensor:
        """The mean over taps and patches, times its weight."""
        config = self.config
        ids = self._patch_ids(queries, config.taps, stream, context)
        query_rows = (self.output_heads if config.separate_encoder else self.heads)(queries, ids)
        with self._keys_learn():
            key_rows = self.heads(keys, ids)
        losses = []
        for tap, query, key in zip(config.taps, query_rows, key_rows, strict=True):
            key, first = context.all_ranks(key) if config.all_negatives else (key, 0)
            external = self.bank.negatives(stream, tap) if self.bank is not None else None
            loss = patch_nce(
                query, key, self._groups(query, queries[0]), config.temperature, first,
                external=external, teach_keys=config.separate_encoder,
            )  # fmt: skip
            losses.append(loss.mean())
        return torch.stack(losses).mean() * config.lambda_nce

    def _groups(self, rows: Tensor, images: Tensor) -> int:
        """Runs of rows whose keys are each other's negatives: the whole batch, an image each, or a patch each."""
        if self.config.all_negatives:
            return 1
        return len(images) if self.config.bank.internal else len(rows)

    def _remember(self, bank: MemoryBank, stream: str, images: Tensor, context: StepContext) -> None:
        """Put this step's patches of all ranks into the bank, in the order of the slots of the global batch."""
        features = bank.encoder.encode(images, bank.taps)
        ids = self._patch_ids(features, bank.taps, stream, context)
        for tap, rows in zip(bank.taps, bank.heads(features, ids), strict=True):
            bank.enqueue(stream, tap, context.all_ranks(rows)[0])

    def _patch_ids(
        self, features: Sequence[Tensor], taps: Sequence[int], stream: str, context: StepContext
    ) -> list[Tensor]:
        ids = [
            context.draws.patch_ids(stream, tap, feature.shape[2] * feature.shape[3], self.config.patches)
            for tap, feature in zip(taps, features, strict=True)
        ]
        return [each.to(features[0].device, non_blocking=True) for each in ids]

    # ---- the robustness part, and what it is compared with ----------------------------------------------------------

    def _constraints(
        self, outputs: CutOutputs, batch: Batch, context: StepContext
    ) -> Iterator[tuple[str, float, Tensor]]:
        """What G is held to at this point of the schedule: name, weight and value of each term."""
        robust, constraint = self.config.robust, self.config.constraint
        if robust.beta > 0 and context.progress >= robust.start:
            yield "robust", robust.beta, self._robustness(outputs, batch, context)
        if context.progress < constraint.start:
            return
        source = batch.source.flip(3) if outputs.flipped else batch.source  # as G saw it
        if self.distances is not None:
            term = self_distance_loss(source, outputs.fake, self.distances.mean, self.distances.std)
            yield "self_distance", constraint.self_distance, term
        if constraint.smoothness > 0:
            places = (source.shape[2] - PATCH_SIZE + 1) * (source.shape[3] - PATCH_SIZE + 1)
            corners = context.draws.patch_ids("smoothness", 0, places, min(self.config.patches, places) // 2 * 2)
            term = smoothness_loss(source, outputs.fake, corners.to(source.device, non_blocking=True))
            yield "smoothness", constraint.smoothness, term
        if constraint.consistency > 0:
            yield "consistency", constraint.consistency, self._consistency(outputs, context)

    def _consistency(self, outputs: CutOutputs, context: StepContext) -> Tensor:
        """L^sc, the mean over all taps."""
        taps, sources = self.config.taps, outputs.source_features
        ids = self._patch_ids(sources, taps, "consistency", context)
        rows = self.heads([*sources, *self.generator.encode(outputs.fake, taps)], [*ids, *ids], [*range(len(taps))] * 2)
        pairs = zip(rows[: len(taps)], rows[len(taps) :], strict=True)
        return torch.stack([consistency_loss(source, translated) for source, translated in pairs]).mean()

    def _robustness(self, outputs: CutOutputs, batch: Batch, context: StepContext) -> Tensor:
        """L_robust over the taps of this step, divided by the number of all K taps, as Eqn. 3 and the published code."""
        config, all_taps = self.config.robust, self.config.robust_taps
        rule: Any = config.rule
        taps = all_taps if config.per_step == "all" else (all_taps[context.draws.choice("robust", len(all_taps))],)
        heads = [self.config.taps.index(tap) for tap in taps]
        clean = [outputs.source_features[head] for head in heads]
        taus, magnitudes = zip(
            *(
                perturbation(*context.draws.noise(tap, batch.slots, feature), config.T, rule, config.least)
                for tap, feature in zip(taps, clean, strict=True)
            ),
            strict=True,
        )
        perturbed = self.generator.perturbed_features([f + tau for f, tau in zip(clean, taus, strict=True)], taps)

        reference = clean if config.reference == "source" else self.generator.encode(outputs.fake, taps)
        ids = self._patch_ids(clean, taps, "robust", context)
        rows = self._semantics([*reference, *perturbed], [*ids, *ids], [*heads, *heads])
        count = len(taps)
        terms = [robustness_loss(rows[k], rows[count + k], magnitudes[k], ids[k]) for k in range(count)]
        return torch.stack(terms).sum() / len(all_taps)

    def _semantics(self, features: Sequence[Tensor], ids: Sequence[Tensor], heads: Sequence[int]) -> list[Tensor]:
        """The patches that L_robust compares, (B * n, dim) for each feature map, float32 or wider."""
        config = self.config.robust
        if config.semantics == "features":
            rows = [sample_patches(*pair) for pair in zip(features, ids, strict=True)]
            return [row.to(torch.promote_types(row.dtype, torch.float32)) for row in rows]
        if config.gradient == "generator":
            return frozen(self.heads, features, ids, heads)
        return self.heads(features, ids, heads)


def _slot_name(slot: int) -> str:
    return f"buffer/{slot}"


def _reported(**losses: Tensor) -> Losses:
    return {name: loss.detach() for name, loss in losses.items()}
