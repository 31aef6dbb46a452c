"""What a step would take on a GPU, from what it asks for on the simulated one (simulated_cuda/):

    python -m tests.trainer.predicted_step [--json FILE]

prints predicted milliseconds for cards, batches and taps in Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from infra import tables
from launch.benchmarks.prediction import CARDS, predict
from tests.trainer.simulated_cuda import counted, library

BATCHES = (1, 4, 16, 32)
PAIR_FLOPS = {"one": 1.67e12, "all": 3.20e12}  # of docs/performance.md, "The work of a step"


def count(taps: str, batch: int, lib: Path) -> dict[str, Any]:
    """`Calls` of SRUNIT's step at full size."""
    engine = {"precision": "bf16", "triton": "true"}
    request = {"method": "srunit", "options": {"robust.per_step": taps}, "batch": batch, "size": 256, "engine": engine}
    script = Path(counted.__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(lib)], input=json.dumps(request), text=True, capture_output=True, check=True,
        env=os.environ | {"PYTHONPATH": str(script.parents[3])},
    )  # fmt: skip
    return json.loads(done.stdout)


def main() -> None:
    own = argparse.ArgumentParser()
    own.add_argument("--json", type=Path)
    args = own.parse_args()
    rows, found = [], []
    with tempfile.TemporaryDirectory() as work:
        lib = library.build(Path(work))
        for taps in PAIR_FLOPS:
            for batch in BATCHES:
                calls = count(taps, batch, lib)
                cells = [
                    taps,
                    str(batch),
                    f"{sum(calls['calls'].values()):,}",
                    f"{sum(calls['bytes'].values()) / 1e9:.0f}",
                ]
                for card in CARDS:
                    times = predict(card, calls["calls"], calls["bytes"], batch * PAIR_FLOPS[taps])
                    cells += [f"{1e3 * each:.1f}" for each in (times.host, times.device, times.fused)]
                    cells += [f"{batch / times.eager:.0f} to {batch / times.fused:.0f}"]
                    found.append({"taps": taps, "batch": batch, "card": card.name, **vars(times)})
                rows.append(cells)
    head = ["taps", "batch", "calls", "10^9 bytes"]
    for card in CARDS:
        head += [f"{card.name.split()[0]}: host", "device", "fused", "pairs/s"]
    print(tables.markdown(head, rows))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
