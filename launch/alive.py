"""Whether a training goes on, for liveness probes: python launch/alive.py runs/NAME."""

import argparse
import time
from pathlib import Path

import psutil

from infra.disk import local_path
from infra.errors import FAULT, Stopped, exits_cleanly
from infra.json_lines import read_json

DESCRIPTION = """Ends with 1 if a training that runs has ended no step for too long, else with 0: also while it is set up, once it
has ended, and where there is none. What status.json says from before this container began counts as nothing."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "alive.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("run", type=local_path, metavar="RUN", help="a run folder")
    result.add_argument(
        "--within", type=float, default=1800.0, metavar="SECONDS",
        help="longer than a step, an evaluation or a checkpoint takes [%(default)g]",
    )  # fmt: skip
    return result


def check(run: Path, within: float, began: float) -> None:
    """Stopped if it is dead. began: when this container did, in seconds since 1970."""
    facts = read_json(run / "status.json", dict)
    progress = facts.get("progress")
    if facts.get("state") != "RUNNING" or not isinstance(progress, int | float) or progress < began:
        return
    if (idle := time.time() - progress) > within:
        raise Stopped(f"the run in {run} has ended no step for {idle:.0f} s", FAULT)


@exits_cleanly
def main() -> None:
    args = parser().parse_args()
    check(args.run, args.within, psutil.Process(1).create_time())


if __name__ == "__main__":
    main()
