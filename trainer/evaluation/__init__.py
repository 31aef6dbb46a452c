"""What a translation is worth: pictures that claim to be of the target domain are looked at and counted.

Everything counted is mergeable, so the images may be spread over any number of ranks and the figures stay the same to
the last bit. docs/evaluation.md defines the figures.
"""

from trainer.evaluation.judge import Judge, Tally, figures
from trainer.evaluation.paired import deltas_of

__all__ = ["Judge", "Tally", "deltas_of", "figures"]
