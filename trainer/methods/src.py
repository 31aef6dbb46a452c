"""SRC: Jung et al. 2022, "Exploring Patch-wise Semantic Relation for Contrastive Learning in Image-to-Image Translation
Tasks".

CUT with hDCE in place of PatchNCE, and the loss on the semantic relation of patches.
"""

from dataclasses import dataclass

from trainer.methods.cut import Cut, OneSidedConfig
from trainer.methods.parts.relation import RelationConfig, RelationContrast


@dataclass(frozen=True, kw_only=True)
class SrcConfig(RelationConfig, OneSidedConfig):
    def build(self, *, seed: int, global_batch: int) -> "Src":
        return Src(self, seed=seed, global_batch=global_batch)


# Of SRC's script for Cityscapes: gamma falls to 1 after 200 of 400 epochs.
CITYSCAPES = {"method.lambda_src": 0.1, "method.gamma_step": 0.5}


class Src(Cut):
    config: SrcConfig

    def make_contrast(self, seed: int) -> RelationContrast:
        return RelationContrast(self.config, self.generator, seed)
