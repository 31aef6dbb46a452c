"""The networks of CUT and SRUNIT, with the published module names, so that published checkpoints load by name."""

from trainer.networks.discriminator import PatchDiscriminator
from trainer.networks.generator import ResnetGenerator
from trainer.networks.heads import ProjectionHeads
from trainer.networks.initialise import init_weights

__all__ = ["PatchDiscriminator", "ProjectionHeads", "ResnetGenerator", "init_weights"]
