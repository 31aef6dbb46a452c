"""The losses of the methods as plain functions of tensors: every random draw comes from outside."""

from trainer.losses.adversarial import accuracy, adversarial_loss, confusion_loss, multi_scale_loss
from trainer.losses.constraints import gradient_norms, smoothness_loss
from trainer.losses.distances import distance_changes, pair_distances, self_distance_loss, self_distances
from trainer.losses.information import mutual_information
from trainer.losses.patchnce import patch_nce
from trainer.losses.reconstruction import l1_distance
from trainer.losses.relation import hard_negative_weights, hdce, relation_loss
from trainer.losses.robustness import (
    consistency_loss,
    mean_inverse,
    perturbation,
    relative_perturbation,
    robustness_loss,
)

__all__ = [
    "accuracy",
    "adversarial_loss",
    "confusion_loss",
    "consistency_loss",
    "distance_changes",
    "gradient_norms",
    "hard_negative_weights",
    "hdce",
    "l1_distance",
    "mean_inverse",
    "multi_scale_loss",
    "mutual_information",
    "pair_distances",
    "patch_nce",
    "perturbation",
    "relation_loss",
    "relative_perturbation",
    "robustness_loss",
    "self_distance_loss",
    "self_distances",
    "smoothness_loss",
]
