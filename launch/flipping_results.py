"""What the flipping benchmark found: a JSON list of runs, to which every command adds, and the tables made from it.

Each run: {"arm", "mismatch", "seed", "steps"}, METRICS as fractions (Dist in grey levels), "evaluations": the same at other
steps, "judge": its name, which is the first digits of the hash of its weights, and "baseline" and "ceiling": of the untranslated
sources and of real images, by the same judge. Figures of two judges are not comparable, so no table has both.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.shapes import shaped
from infra.tables import markdown, spreads
from launch.runs.results import Result, add_results, read_results

Run = Result

STRENGTHS = {"none": 0.0, "middle": 0.5, "strong": 1.0}  # of the mismatch
JUDGE = "judge"
KEY: dict[str, type] = {"arm": str, "mismatch": str, "seed": int, "steps": int}
REMEDY = "name another --json"
# Of each what a table calls it, and what it is multiplied by there.
METRICS = {
    "mIoU": ("mIoU", 100),
    "pxAcc": ("pxAcc", 100),
    "clsAcc": ("clsAcc", 100),
    "flip_rate": ("flip rate", 100),
    "sky_to_vegetation": ("sky → vegetation", 100),
    "building_to_vegetation": ("building → vegetation", 100),
    "drift": ("drift", 100),
    "Dist": ("Dist", 1),
}


def run_of(key: Sequence[Any], judge: str, evaluations: Sequence[Mapping[str, Any]]) -> Run:
    """key: the values of KEY. judge: its name. evaluations: of the run folder, in order, the last at the end."""
    *before, last = evaluations
    others = [{"steps": row["step"], **_metrics(row)} for row in before]
    references = {name: _metrics(last[name]) for name in ("baseline", "ceiling") if name in last}
    return {**dict(zip(KEY, key, strict=True)), JUDGE: judge, **_metrics(last), "evaluations": others, **references}


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: row[name] for name in METRICS if isinstance(row.get(name), float)}


def read_runs(file: Path) -> list[Run]:
    """The runs of a file; none if there is no file. UserError if it holds something else."""
    runs = read_results(file, [*KEY], REMEDY)
    try:
        for number, run in enumerate(runs):
            _check(run, str(number))
    except ValueError as error:
        raise UserError(f"cannot read the runs in {file} ({error}): correct it, or {REMEDY}") from None
    return runs


def _check(run: Run, where: str) -> None:
    """ValueError, with the place, for values that no table can be made of."""
    for name, kind in KEY.items():
        shaped(kind, run[name], f"{where}.{name}")
    shaped(str, run.get(JUDGE, ""), f"{where}.{JUDGE}")
    parts = {f"{where}.{name}": run[name] for name in ("baseline", "ceiling") if name in run}
    rows = shaped(tuple[dict[str, Any], ...], run.get("evaluations", []), f"{where}.evaluations")
    for number, row in enumerate(rows):
        parts[f"{where}.evaluations.{number}"] = row
        shaped(int, row.get("steps"), f"{where}.evaluations.{number}.steps")
    for place, part in {where: run, **parts}.items():
        for name in METRICS.keys() & shaped(dict[str, Any], part, place).keys():
            shaped(float, part[name], f"{place}.{name}")


def add_runs(file: Path, runs: Sequence[Run]) -> None:
    """Put runs into the file, over those of the same arm, mismatch, seed, steps and judge; all others stay."""
    read_runs(file)
    add_results(file, runs, [*KEY], lambda run: (*_setting(run), run["arm"], run["seed"]), REMEDY, [JUDGE])


def _setting(run: Run) -> tuple[int, int, str, str]:
    """What runs are compared within, in the order of the tables."""
    mismatch = run["mismatch"]
    return run["steps"], [*STRENGTHS, mismatch].index(mismatch), mismatch, run.get(JUDGE, "")


def tables(runs: Sequence[Run], titles: Mapping[str, str]) -> str:
    """Markdown, a table for each number of steps, mismatch and judge: mean ± standard deviation over the seeds of each arm, after
    the untranslated sources and real images.

    titles: of the arms, in the order wanted; an arm without one comes last, by its name. UserError if there are no runs.
    """
    if not runs:
        raise UserError("there are no finished runs to make a table of: train some with launch/flipping.py")
    settings = sorted({_setting(run) for run in runs})
    return "\n".join(_table([run for run in runs if _setting(run) == setting], titles) for setting in settings)


def differences(runs: Sequence[Run], titles: Mapping[str, str], against: str) -> str:
    """Markdown, a table for each number of steps, mismatch and judge: in points, how much more each arm flips than one of them
    with the same seed at the same step, as the mean over the seeds, and in how many of these pairs it flips less. From half of
    the steps on: losses that start later, and a generator that rests, make no difference that could be compared before.

    titles: as of `tables`. UserError if there are no runs of that arm.
    """
    settings = sorted({_setting(run) for run in runs if run["arm"] == against})
    if not settings:
        raise UserError(f"there are no finished runs of the arm {against} to compare with: name one that the file has")
    return "\n".join(
        _difference([run for run in runs if _setting(run) == setting], titles, against) for setting in settings
    )


def _difference(runs: Sequence[Run], titles: Mapping[str, str], against: str) -> str:
    base = {run["seed"]: _flips_by_step(run) for run in runs if run["arm"] == against}
    steps = sorted({step for flips in base.values() for step in flips if 2 * step >= runs[0]["steps"]})
    rows = []
    for arm, own in _by_arm(runs, titles).items():
        pairs = {run["seed"]: (_flips_by_step(run), base[run["seed"]]) for run in own if run["seed"] in base}
        more = {step: [a[step] - b[step] for a, b in pairs.values() if step in a and step in b] for step in steps}
        points = [f"{100 * sum(found) / len(found):+.1f}" if found else "–" for found in more.values()]
        every = [each for found in more.values() for each in found]
        if arm != against and every:
            fewer = f"{sum(each < 0 for each in every)} of {len(every)}"
            rows.append([titles.get(arm, arm), ", ".join(map(str, pairs)), *points, fewer])
    header = ["arm", "seeds", *(f"at {step:,}" for step in steps), f"less than {titles.get(against, against)}"]
    return f"{_title(runs)}, flip rate against that of {titles.get(against, against)}, in points\n\n{markdown(header, rows)}\n"


def _flips_by_step(run: Run) -> dict[int, float]:
    return {row["steps"]: row["flip_rate"] for row in (*run.get("evaluations", []), run) if "flip_rate" in row}


def _by_arm(runs: Sequence[Run], titles: Mapping[str, str]) -> dict[str, list[Run]]:
    """Those with a title in the order of the titles, then others by name; the runs of each by seed."""
    present = {run["arm"] for run in runs}
    names = (*(name for name in titles if name in present), *sorted(present - titles.keys()))
    return {arm: sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"]) for arm in names}


def _title(runs: Sequence[Run]) -> str:
    title = f"Mismatch {runs[0]['mismatch']}, {runs[0]['steps']:,} steps"
    return f"{title}, judge {judge}" if (judge := runs[0].get(JUDGE)) else title


def _table(runs: Sequence[Run], titles: Mapping[str, str]) -> str:
    columns = {name: factor for name, (_, factor) in METRICS.items() if any(name in run for run in runs)}
    checkpoints = sorted({row["steps"] for run in runs for row in run.get("evaluations", [])})
    header = ["arm", "seeds", *(METRICS[name][0] for name in columns), *(f"flip rate at {n:,}" for n in checkpoints)]
    blank = [""] * len(checkpoints)
    rows = [
        [name, "", *(cell.replace("–", "") for cell in spreads([runs[0][part]], columns)), *blank]
        for name, part in (("untranslated", "baseline"), ("real images (ceiling)", "ceiling"))
        if part in runs[0]
    ]
    for arm, own in _by_arm(runs, titles).items():
        earlier = [[row for run in own for row in run.get("evaluations", []) if row["steps"] == n] for n in checkpoints]
        on_the_way = [cell for rows_there in earlier for cell in spreads(rows_there, {"flip_rate": 100})]
        seeds = ", ".join(str(run["seed"]) for run in own)
        rows.append([titles.get(arm, arm), seeds, *spreads(own, columns), *on_the_way])
    return f"{_title(runs)}\n\n{markdown(header, rows)}\n"
