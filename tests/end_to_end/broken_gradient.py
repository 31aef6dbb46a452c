"""launch/train.py with a fault: in step BROKEN_AT the last rank's generator gets a gradient that is not finite."""

import os
from typing import Any

from launch.train import main
from tests.trainer.test_nonfinite import BadGradient
from trainer.methods.cut import Cut

BROKEN, RANK = int(os.environ["BROKEN_AT"]), int(os.environ.get("RANK", 0))
original = Cut.loss


def loss(self: Cut, phase: str, outputs: Any, batch: Any, context: Any) -> Any:
    value, named = original(self, phase, outputs, batch, context)
    faulty = RANK == 1 and phase == "generator" and context.draws.step + 1 == BROKEN
    return (BadGradient.apply(value) if faulty else value), named


Cut.loss = loss  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
