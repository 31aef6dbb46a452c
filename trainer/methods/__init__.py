"""Translation methods, and for each name the preset of options that its paper gives."""

from typing import Any

from trainer.methods.ablations import ABLATIONS
from trainer.methods.base import Method
from trainer.methods.config import CutConfig
from trainer.methods.cut import Cut

__all__ = ["ABLATIONS", "METHODS", "Cut", "CutConfig", "Method"]

METHODS: dict[str, dict[str, Any]] = {
    "cut": {"method.robust.beta": 0.0, "method.buffer": 0, "method.normalisation": "cut"},
    "fastcut": {
        "method.robust.beta": 0.0, "method.buffer": 0, "method.normalisation": "cut",
        "method.identity": False, "method.lambda_nce": 10.0, "method.flip_equivariance": True,
        "optim.epochs": 150.0, "optim.decay_epochs": 50.0,
    },
    # The paper's defaults are those of CutConfig itself (Sec. 5.3 and Appendix F).
    "srunit": {},
}  # fmt: skip
