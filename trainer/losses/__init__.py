"""The losses of CUT and SRUNIT as plain functions of tensors: every random draw comes from outside."""

from trainer.losses.adversarial import adversarial_loss
from trainer.losses.patchnce import patch_nce
from trainer.losses.robustness import perturbation, robustness_loss

__all__ = ["adversarial_loss", "patch_nce", "perturbation", "robustness_loss"]
