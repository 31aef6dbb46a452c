"""Patches of translations against those of their originals: PatchNCE with its heads, and the variants of it that CUT's
ablation study has (its Appendix C.1 and C.5)."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from infra.config import option
from infra.errors import UserError
from trainer.draws import generator
from trainer.losses import patch_nce
from trainer.methods.base import Batch, Losses, StepContext
from trainer.methods.parts.memory import MemoryBank
from trainer.methods.parts.part import Outputs, Owner, patch_ids
from trainer.networks import ProjectionHeads, ResnetGenerator, init_weights
from trainer.networks.split import split_batch

# The padded input, the two down-sampling convolutions, the first and the fifth residual block (CUT, Appendix C.1).
PAPER_TAPS = (0, 4, 8, 12, 16)


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """External negatives (CUT, Appendix C.1, after He et al. 2020, MoCo)."""

    size: int = option(0, "patches of earlier images kept as negatives, per layer; 0: none (CUT's comparison: 16384)")
    momentum: float = option(
        0.999, "share that the bank's encoder and heads keep of themselves in each step", adjustable=True
    )
    internal: bool = option(True, "negatives from the image itself too, not only from the bank")

    def __post_init__(self) -> None:
        if self.size < 0 or not 0 <= self.momentum <= 1:
            raise UserError(
                "method.bank.size counts patches (0 or more), and method.bank.momentum is a share from 0 to 1"
            )
        if not self.internal and not self.size:
            raise UserError("method.bank.internal false leaves no negatives: give method.bank.size, such as 16384")


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """Which patches are compared, and their heads: a section of a method's own options."""

    least_patches: ClassVar[int] = 2  # with fewer the same image has no negatives

    taps: tuple[int, ...] = option(PAPER_TAPS, "layers of G whose patches are contrasted")
    patches: int = option(256, "patches per image and layer", adjustable=True)
    temperature: float = option(0.07, "temperature of the contrastive loss", adjustable=True)
    head_dim: int = option(256, "channels of the projection heads")
    normalisation: str = option("cut", "epsilon of the heads' normalisation", choices=("cut", "srunit"))

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.patches < self.least_patches:
            raise UserError(f"method.temperature must be positive, and method.patches {self.least_patches} or more")
        if self.head_dim < 1:
            raise UserError("method.head_dim counts channels: it must be 1 or more")
        if not self.taps:
            raise UserError("method.taps is empty: name layers of the generator such as 0,4,8,12,16")


@dataclass(frozen=True, kw_only=True)
class IdentityConfig(PatchConfig):
    identity: bool = option(True, "contrast target images too, which G should leave as they are")


@dataclass(frozen=True, kw_only=True)
class ContrastConfig(IdentityConfig):
    """A section of a method's own options."""

    lambda_nce: float = option(1.0, "weight of PatchNCE", adjustable=True)
    all_negatives: bool = option(False, "negatives from the whole global batch, not only from the same image")
    separate_encoder: bool = option(False, "an encoder and heads of their own for the translations, not those of G")
    decoder_nce: bool = option(True, "PatchNCE trains G's decoder too; false: its encoder and the heads alone")
    bank: BankConfig = field(default_factory=BankConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lambda_nce <= 0:
            raise UserError("method.lambda_nce must be positive: PatchNCE trains the heads")
        if self.all_negatives and self.separate_encoder:
            raise UserError("method.separate_encoder trains the keys, which method.all_negatives gathers from other ranks "
                            "without gradients: leave one of them out")  # fmt: skip
        if self.all_negatives and not self.bank.internal:
            raise UserError("method.all_negatives asks for negatives of the batch and method.bank.internal false for none "
                            "of them: leave one of them out")  # fmt: skip


@dataclass
class Compared:
    """Features at the taps that a loss compares: queries of what G made of the source, keys of the source, and the same of
    the target, if asked for."""

    queries: list[Tensor]
    keys: list[Tensor]
    identity: tuple[list[Tensor], list[Tensor]] | None


class PatchContrast(Owner, ABC):
    """A loss between projected patches of what G made and of what it was made of.

    networks: the heads F_k.
    """

    def __init__(self, config: PatchConfig, encoder: ResnetGenerator, seed: int) -> None:
        super().__init__()
        self.config, self.generator = config, encoder
        normalisation: Any = config.normalisation
        self.heads = ProjectionHeads(encoder.tap_channels(config.taps), config.head_dim, normalisation)
        self.networks = {"heads": self.heads}
        init_weights(self.heads, generator("cpu", seed, "init", "heads"))

    def guesses(self) -> dict[str, float]:
        """See `Guesses.contrasts`."""
        return {}

    @abstractmethod
    def losses(self, outputs: Outputs, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        """What is added to G's loss, and the named scalars to report."""

    def compared(self, outputs: Outputs, batch: Batch) -> Compared:
        taps = self.config.taps
        made = outputs.fake if outputs.identity is None else torch.cat([outputs.fake, outputs.identity])
        queries = self._encode_made(made)
        keys, keys_identity = outputs.source_features, outputs.target_features
        if outputs.flipped:
            # The features kept are those of mirrored images; a key is encoded from the image as it was.
            queries = [query.flip(3) for query in queries]
            with self._keys_learn():
                keys = self.generator.encode(batch.source, taps)
                keys_identity = self.generator.encode(batch.target, taps) if keys_identity else None
        if keys_identity is None:
            return Compared(queries, keys, None)
        domains = [len(batch.source), len(batch.target)]
        of_fake, of_identity = zip(*(split_batch(query, domains) for query in queries), strict=True)
        return Compared(list(of_fake), keys, (list(of_identity), keys_identity))

    def _encode_made(self, made: Tensor) -> list[Tensor]:
        return self.generator.encode(made, self.config.taps)

    def _keys_learn(self) -> torch.set_grad_enabled:
        """Where encoder and heads are shared they learn from the queries alone."""
        return torch.set_grad_enabled(False)


class Contrast(PatchContrast):
    """PatchNCE between source and translation, and between target and its identity translation if asked for.

    networks: with a separate encoder that and its heads, too. memory: the bank, if there is one.
    """

    config: ContrastConfig

    def __init__(self, config: ContrastConfig, encoder: ResnetGenerator, seed: int) -> None:
        super().__init__(config, encoder, seed)
        if config.separate_encoder:
            self.output_encoder, self.output_heads = encoder.copy_encoder(config.taps), copy.deepcopy(self.heads)
            own = {"output_encoder": self.output_encoder, "output_heads": self.output_heads}
            for name, network in own.items():
                init_weights(network, generator("cpu", seed, "init", name))
            self.networks |= own
        self.bank: MemoryBank | None = None
        if config.bank.size > 0:
            self.bank = MemoryBank(
                config.bank.size, config.bank.momentum, encoder.copy_encoder(config.taps), self.heads, taps=config.taps,
                dim=config.head_dim, streams=("nce", "identity") if config.identity else ("nce",), seed=seed,
            )  # fmt: skip
        self.memory = {"bank": self.bank} if self.bank else {}

    def losses(self, outputs: Outputs, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        nce, nce_identity = self.values(outputs, batch, context)
        if nce_identity is None:
            return nce, {"NCE": nce}
        return (nce + nce_identity) / 2, {"NCE": nce, "NCE_Y": nce_identity}

    def guesses(self) -> dict[str, float]:
        """A guess among the keys that a patch is compared with: as many as asked for, though small maps have fewer, and one
        image's, though `all_negatives` has those of all."""
        keys = self.config.patches if self.config.bank.internal else 1
        value = self.config.lambda_nce * math.log(keys + self.config.bank.size)
        return dict.fromkeys(("NCE", "NCE_Y") if self.config.identity else ("NCE",), value)

    def values(self, outputs: Outputs, batch: Batch, context: StepContext) -> tuple[Tensor, Tensor | None]:
        """Both, each times its weight; the second None if not asked for."""
        compared = self.compared(outputs, batch)
        nce = self._nce(compared.queries, compared.keys, "nce", context)
        return nce, self._nce(*compared.identity, "identity", context) if compared.identity else None

    def _encode_made(self, made: Tensor) -> list[Tensor]:
        encoder = self.output_encoder if self.config.separate_encoder else self.generator
        return encoder.encode(made if self.config.decoder_nce else made.detach(), self.config.taps)

    def _keys_learn(self) -> torch.set_grad_enabled:
        """Heads of their own see source images alone: they would learn nothing, so there the keys teach them."""
        return torch.set_grad_enabled(self.config.separate_encoder)

    def _nce(self, queries: Sequence[Tensor], keys: Sequence[Tensor], stream: str, context: StepContext) -> Tensor:
        """The mean over taps and patches, times its weight."""
        config = self.config
        ids = patch_ids(queries, config.taps, config.patches, stream, context)
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

    def after_step(self, batches: Sequence[Batch], context: StepContext) -> None:
        """Put this step's patches of all ranks into the bank, in the order of the slots of the global batch."""
        if self.bank is None:
            return
        self.bank.follow(self.generator, self.heads)
        for batch in batches:
            for stream in self.bank.streams:
                images = batch.source if stream == "nce" else batch.target
                features = self.bank.encoder.encode(images, self.bank.taps)
                ids = patch_ids(features, self.bank.taps, self.config.patches, stream, context)
                for tap, rows in zip(self.bank.taps, self.bank.heads(features, ids), strict=True):
                    self.bank.enqueue(stream, tap, context.all_ranks(rows)[0])
