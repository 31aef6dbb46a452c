"""The first hour of a GPU as one command: parity, rates, steps, operators, decoding, a whole training, translating, flipping.

Each measure is a command in a process of its own with a limit of its own. What is found is in OUT/results.json as soon as it is
there, by the measure's name: its command, seconds, exit status (null: it ran into its limit), metrics {name: number}, and the end
of what it printed. The same command again takes up what is missing.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra import tables
from infra.errors import UserError
from infra.json_lines import read_json
from infra.storage import replacing
from launch.benchmarks.measuring import machine, versions

HELP = "all of a GPU that docs/performance.md asks for: parity first, then speed, in at most --minutes"
ROOT = Path(__file__).parents[2]
RESULTS = "results.json"
STEP, TRAIN = "launch/bench.py step", "launch/train.py"
# Small enough for a CPU to go through every line.
TOY = ("--engine.device cpu --precision fp32 --engine.compile false --ngf 2 --ndf 2 --method.generator.blocks 6 --data.threads 1 "
       "--data.decoder pillow --crop 64")  # fmt: skip
TOY_OF = {"srunit": "--method.head-dim 4 --method.patches 8", "cut": "--method.head-dim 4 --method.patches 8",
          "cyclegan": "", "semst": "--method.head-dim 4 --method.patches 8 --method.local 32"}  # fmt: skip

Metrics = dict[str, float]
Call = Callable[[Sequence[str], float, Path], int | None]


@dataclass(frozen=True)
class Measure:
    """command: after the interpreter. limit: seconds. found: the file that it writes, which has its metrics."""

    name: str
    command: tuple[str, ...]
    limit: float
    found: Path | None = None


def plan(out: Path, *, toy: bool) -> list[Measure]:
    """Every measure in the order of what is most wanted. toy: all of one size, on a CPU."""
    batches = (1,) if toy else (16, 1, 32, 64)
    least = ["--repetitions", "1", "--steps", "1"] if toy else ["--repetitions", "3"]
    sizes = {"512x256": 400, "1024x512": 200} if not toy else {"128x64": 4}
    first, *_ = (out / f"data-{size}" for size in sizes)
    measures: list[Measure] = []

    def add(name: str, command: str, limit: float, options: Sequence[object] = (), found: Path | None = None) -> None:
        measures.append(Measure(name, (*command.split(), *map(str, options)), limit, found))

    def bench(name: str, command: str, limit: float, *options: str, method: str = "srunit", data: Path = first) -> None:
        file = out / f"{name.replace('/', '-').replace(' ', '-')}.json"
        small = [*TOY.split(), *TOY_OF[method].split()] if toy else ["--precision", "bf16"]
        repeat = least[:2] if "published" in command else least
        add(name, command, limit, [*repeat, "--json", file, "--data", data, "--method", method, *small, *options], file)

    for size, count in sizes.items():
        shape = ["--count", count, "--size", size, "--test-count", 2, "--shard-size", 2 if toy else 64, "--out"]
        add(f"data/{size}", "launch/prepare.py street-scenes", 120, [*shape, out / f"data-{size}"])
    add("parity", "-m pytest -q -m gpu tests/trainer" + (" --collect-only" if toy else ""), 300)
    bench("rates", "launch/bench.py rates", 60)
    one, every = ("--method.robust.per-step", "one"), ("--method.robust.per-step", "all")
    graphs = ("--engine.graphs", "true")
    eager, compiled = ("--engine.compile", "false"), ("--engine.compile", "false" if toy else "true")
    for batch in batches:
        bench(f"step/srunit one tap/{batch}/eager", STEP, 90, "--global-batch", str(batch), *one, *eager)
    for batch in batches[:2]:  # a graph is captured in seconds
        bench(f"step/srunit one tap/{batch}/graphs", STEP, 120, "--global-batch", str(batch), *one, *eager, *graphs)
    for batch in batches[:2]:  # a pass is compiled anew for each batch, and for each tap
        bench(f"step/srunit one tap/{batch}/compiled", STEP, 300, "--global-batch", str(batch), *one, *compiled)
    bench("step/published", "-m tests.trainer.published_step", 120, *one, *eager)
    of_one, of_batch = ("--global-batch", "1"), ("--global-batch", str(batches[0]))
    bench("step/srunit one tap/1/compiled, graphs", STEP, 300, *of_one, *one, *compiled, *graphs)
    bench(f"step/srunit all taps/{batches[0]}/eager", STEP, 90, *of_batch, *every, *eager)
    for method in ("cut", "cyclegan", "semst"):
        bench(f"step/{method}/{batches[0]}/eager", STEP, 90, *of_batch, *eager, method=method)
    bench("operators", "launch/bench.py ops", 120)
    for size in sizes:
        bench(f"decode/{size}", "launch/bench.py decode", 60, data=out / f"data-{size}")
    folder, launcher = out / "run", TRAIN if toy else f"-m deepspeed.launcher.runner --num_gpus 1 {TRAIN}"
    options = ["--data", first, "--run-dir", folder, "--loop.report-every", 1 if toy else 25, *one]
    whole = f"{TOY} {TOY_OF['srunit']} --max-steps 2" if toy else "--max-steps 300 --global-batch 16"
    add("training", f"{launcher} --task gta2city", 240, [*options, *whole.split()], folder / "metrics.jsonl")
    bench("translate", "launch/bench.py translate", 60)
    runs, ends = (
        out / "flipping",
        "--help" if toy else "--tier gpu --arms cut srunit best --mismatch middle --seed-list 0 --out",
    )
    add("flipping", f"launch/flipping.py {ends}", 900, () if toy else [runs], None if toy else runs / "runs.json")
    return measures


def run(out: Path, minutes: float, *, toy: bool = False, call: Call | None = None, only: Sequence[str] = ()) -> Path:
    """Take what is missing, until this time is over; returns the file of results. only: names, or how they begin."""
    call, file, end = call or in_process, out / RESULTS, time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = read_results(file) if file.is_file() else {"measures": {}}
    report |= {"machine": machine(), "versions": versions()}
    measures = [each for each in plan(out, toy=toy) if not only or each.name.startswith(tuple(only))]
    if not measures:
        raise UserError(f"no measure is called {' or '.join(only)}: leave out --only, or see {file} for names")
    for number, measure in enumerate(measures, 1):
        limit = min(measure.limit, end - time.monotonic())
        if (report["measures"].get(measure.name) or {}).get("status") == 0 or limit < 10:
            continue
        print(f"{number} of {len(measures)}: {measure.name}, at most {limit:.0f} s", flush=True)
        begin, log = time.monotonic(), out / "log.txt"
        status = call(measure.command, limit, log)
        report["measures"][measure.name] = {
            "command": " ".join(["python", *measure.command]), "seconds": round(time.monotonic() - begin, 1), "status": status,
            "metrics": read(measure.found), "end": log.read_text(errors="replace")[-2000:] if log.is_file() else "",
        }  # fmt: skip
        with replacing(file) as target:
            target.write((json.dumps(report, indent=1) + "\n").encode())
    file.with_suffix(".md").write_text(table(report))
    return file


def read_results(file: Path) -> dict[str, Any]:
    """What a file of results holds. UserError where there is none, or it is another file."""
    found: dict[str, Any] = read_json(file, dict)
    if not isinstance(found.get("measures"), dict):
        raise UserError(f"{file} holds no results of launch/bench.py gpu: measure first, or name its {RESULTS}")
    return found


def in_process(command: Sequence[str], limit: float, log: Path) -> int | None:
    """Run a command with all that it starts; its exit status, None where it ran into its limit."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )  # fmt: skip
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def read(file: Path | None) -> Metrics:
    """The numbers in what a measure left: a benchmark's JSON, a run's metrics (of its last half), or a list of flipping runs."""
    if file is None or not file.is_file():
        return {}
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        steady = rows[len(rows) // 2 :]
        return (
            {name: sum(row[name] for row in steady) / len(steady) for name in ("pairs_per_s", "memory_gib")}
            if steady
            else {}
        )
    found = json.loads(file.read_text())
    if isinstance(found, list):
        return {
            f"{each['arm']}/{name}": each[name]
            for each in found
            for name in ("flip_rate", "mIoU", "Dist")
            if name in each
        }
    return {name: metric["median"] for name, metric in found["metrics"].items()}


def table(report: Mapping[str, Any]) -> str:
    """All of it in Markdown: the steps as one table, the rest as another."""
    measures: Mapping[str, Any] = report["measures"]
    if not measures:
        return "Nothing measured yet.\n"
    steps = [
        (name.removeprefix("step/"), each)
        for name, each in measures.items()
        if name.startswith("step/") and each["metrics"]
    ]
    columns = {"pairs_per_s": "pairs/s", "seconds": "s a step", "tflops": "TFLOP/s", "matmul_share": "of the matrix rate",
               "peak": "peak, GiB"}  # fmt: skip
    kinds = sorted({name for _, each in steps for name in each["metrics"] if name.startswith("share/")})
    head = ["step / batch / how", *columns.values(), *(kind.removeprefix("share/") for kind in kinds)]
    rows = [[name, *(_shown(each["metrics"].get(key)) for key in (*columns, *kinds))] for name, each in steps]
    others = [
        [name, "" if each["status"] == 0 else "limit" if each["status"] is None else f"failed ({each['status']})",
         ", ".join(f"{key} {_shown(value)}" for key, value in each["metrics"].items()) or each["end"].strip().rpartition("\n")[2]]
        for name, each in measures.items() if not (name.startswith("step/") and each["metrics"])
    ]  # fmt: skip
    gpus = ", ".join(report["machine"]["gpus"]) or f"no GPU, {report['machine']['cpu']}"
    about = f"{gpus}; torch {report['versions'].get('torch', '?')}.\n"
    need: list[str] = []
    if steps:
        rate, fastest = max((each["metrics"].get("pairs_per_s", 0.0), name) for name, each in steps)
        need = [
            f"The fastest step ({fastest}) takes {_shown(2 * rate)} images/s, which decoding must keep up with.",
            "",
        ]
    return "\n".join(
        [about, tables.markdown(head, rows), "", *need, tables.markdown(["measure", "", "found"], others), ""]
    )


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def wheels() -> str:
    """What such a machine has to install, as pip's requirements: this environment's versions of what the project asks for, with
    torch for CUDA."""
    wanted, found = ["srunit", "pytest"], dict[str, str]()
    while wanted:
        name = canonicalize_name(wanted.pop())
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        if name in found:
            continue
        found[name] = package.version.partition("+")[0]
        asked = map(Requirement, package.requires or ())
        wanted += [each.name for each in asked if each.marker is None or each.marker.evaluate({"extra": ""})]
    found.pop("srunit", None)
    lines = [f"{name}=={version}" for name, version in sorted(found.items())]
    return "\n".join(["# pip download -d wheels -r THIS; torch brings Triton and CUDA's libraries",
                      "--extra-index-url https://download.pytorch.org/whl/cu130", *lines])  # fmt: skip
