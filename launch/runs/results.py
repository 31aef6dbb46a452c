"""A JSON list of what runs found, to which several commands add, each run under its key."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.storage import replacing
from launch.runs.processes import one_at_a_time

Result = dict[str, Any]


def read_results(file: Path, key: Sequence[str], remedy: str) -> list[Result]:
    """Those of a file; none if there is no file. UserError, with the remedy, if it holds something else than objects with the
    names of `key`."""
    try:
        results = json.loads(file.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the runs in {file} ({error}): correct it, or {remedy}") from None
    if not isinstance(results, list) or not all(isinstance(each, dict) and each.keys() >= {*key} for each in results):
        raise UserError(f"{file} is not a list of runs with {', '.join(key)}: {remedy}")
    return results


def add_results(
    file: Path,
    results: Sequence[Result],
    key: Sequence[str],
    order: Callable[[Result], Any],
    remedy: str,
    optional: Sequence[str] = (),
) -> None:
    """Put results into the file, over those of the same key; all others stay. Several commands may do so at once. optional: parts
    of the key that some results lack."""
    with one_at_a_time(file.parent):
        there = read_results(file, key, remedy)
        merged = {tuple(result.get(name) for name in (*key, *optional)): result for result in (*there, *results)}
        with replacing(file) as opened:
            opened.write((json.dumps(sorted(merged.values(), key=order), indent=1) + "\n").encode())
