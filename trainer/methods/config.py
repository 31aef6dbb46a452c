"""What the options of every method have."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from infra.config import option
from infra.views import SINGLE_CROP, View
from trainer.methods.base import Method
from trainer.translation import Translation


@dataclass(frozen=True, kw_only=True)
class MethodConfig(ABC):
    """The section `method` of the configuration tree: the options of one method, networks included."""

    name: str = option("", "the method")  # the tree of a job adds the choices (launch/runs/config.py)

    @property
    def view(self) -> View:
        """What the method wants of the training images."""
        return SINGLE_CROP

    @property
    def whole_batch(self) -> str:
        """The option because of which a loss needs the whole global batch in one pass; empty: none does."""
        return ""

    @abstractmethod
    def translation(self) -> Translation:
        """What a training with these options makes, with weights yet to come."""

    @abstractmethod
    def build(self, *, seed: int, global_batch: int) -> Method[Any, Any]:
        """The method, with its weights drawn from the seed."""
