"""The flipping benchmark: data, a segmenter, and many trainings alike. `launch/flipping.py` runs it.

OUT/data/{none,middle,strong}    street scenes; the strength is in the layout of the training targets alone
OUT/data/segmenter               more scenes, whose target images train the segmenter
OUT/segmenter                    its run
OUT/runs/STRENGTH-METHOD-SEED    run folders of the translators
OUT/logs                         what each process said
OUT/results.csv, results.md      figures of every run; mean and spread
OUT/pictures.png                 test scenes as each method translates them
"""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from infra.errors import UserError
from infra.storage import replacing
from infra.tables import mean_spread
from pipelines.dataset import Samples
from trainer.samples import stack
from trainer.translator import load_translator

LAUNCH = Path(__file__).parent
STRENGTHS = {"none": 0.0, "middle": 0.5, "strong": 1.0}
FIGURES = {"mIoU": 100, "pxAcc": 100, "clsAcc": 100, "flip_rate": 100, "Dist": 1}  # and what they are multiplied by
PICTURE_ROWS = 3  # scenes of each strength


@dataclass(frozen=True)
class Tier:
    """A size of the benchmark. config: the translators' options. scenes: of prepare.py. counts: training scenes of each
    domain for the translators, target scenes for the segmenter, test scenes. segmenter: options of its training."""

    config: str
    scenes: str
    counts: tuple[int, int, int]
    segmenter: tuple[str, ...]


TIERS = {
    "small": Tier(
        "flipping-small.yaml",
        "128x64",
        (1000, 2000, 100),
        ("--model.output-stride", "8", "--model.width", "0.5", "--optim.epochs", "6", "--precision", "fp32"),
    ),
    "gpu": Tier(
        "flipping-gpu.yaml",
        "256x128",
        (4000, 10000, 500),
        (
            "--model.output-stride",
            "8",
        ),
    ),
}


class Benchmark:
    """betas: SRUNIT's. seeds: runs of each method and strength. parallel: processes at once, which share the cores."""

    def __init__(self, tier: Tier, out: Path, betas: Sequence[float], seeds: int, parallel: int) -> None:
        if seeds < 1 or parallel < 1:
            raise UserError(f"{seeds} seeds and {parallel} trainings at once are impossible: give 1 or more of each")
        if min(betas) < 0:
            raise UserError(f"beta is {min(betas):g}: give 0 or more")
        self.tier, self.out, self.parallel = tier, out, parallel
        # By its name: that of its run folders, and its options.
        self.methods = {"CUT": ("cut", ["--method", "cut"])} | {
            f"SRUNIT, beta {beta:g}": (f"srunit-beta{beta:g}", ["--method", "srunit", "--beta", beta]) for beta in betas
        }
        self.cells = [
            (strength, method, seed) for seed in range(seeds) for strength in STRENGTHS for method in self.methods
        ]

    def run_dir(self, strength: str, method: str, seed: int) -> Path:
        return self.out / "runs" / f"{strength}-{self.methods[method][0]}-{seed}"

    # ---- doing it ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Do whatever is not done yet."""
        count, segmenter_count, test_count = self.tier.counts
        for name, mismatch in STRENGTHS.items():
            self._prepare(name, mismatch, count, test_count)
        self._prepare("segmenter", 0.5, segmenter_count, test_count)
        self._call("segmenter", self._segmenter_command(), os.cpu_count() or 1)
        threads = max(1, (os.cpu_count() or 1) // self.parallel)
        with ThreadPoolExecutor(self.parallel) as pool:
            jobs = [
                pool.submit(self._call, self.run_dir(*cell).name, self._train_command(*cell), threads)
                for cell in self.cells
                if not (self.run_dir(*cell) / "model").is_dir()  # the last thing that a run leaves
            ]
            try:
                for job in tqdm(as_completed(jobs), "training", len(jobs), unit="run"):
                    job.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _prepare(self, name: str, mismatch: float, count: int, test_count: int) -> None:
        options = ["--count", count, "--test-count", test_count, "--size", self.tier.scenes, "--mismatch", mismatch]
        options += ["--out", self.out / "data" / name]
        self._call(f"prepare-{name}", [LAUNCH / "prepare.py", "street-scenes", *options], os.cpu_count() or 1)

    def _segmenter_command(self) -> list[Any]:
        data, run_dir = self.out / "data" / "segmenter", self.out / "segmenter"
        return [LAUNCH / "train_segmenter.py", "--data", data, "--run-dir", run_dir, *self.tier.segmenter]

    def _train_command(self, strength: str, method: str, seed: int) -> list[Any]:
        return [
            LAUNCH / "train.py", "--task", "gta2city", "--config", LAUNCH / self.tier.config, *self.methods[method][1],
            "--seed", seed, "--data", self.out / "data" / strength, "--run-dir", self.run_dir(strength, method, seed),
            "--evaluation.segmenter", self.out / "segmenter",
        ]  # fmt: skip

    def _call(self, name: str, command: Sequence[Any], threads: int) -> None:
        """Run one of the project's scripts; UserError with the end of its log if it fails."""
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with log.open("ab") as output:
            arguments = [sys.executable, *map(str, command)]
            done = subprocess.run(arguments, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
        if done.returncode:
            last = log.read_text().strip().splitlines()[-1:]
            raise UserError(f"{name} failed ({''.join(last)}): see {log}, and run the same command again to continue")

    # ---- what came out ----------------------------------------------------------------------------------------------

    def report(self) -> str:
        """Write the results and say where they are, below the table."""
        results = {cell: _last_evaluation(self.run_dir(*cell)) for cell in self.cells}
        text = self._table(results)
        files = {"results.csv": self._csv(results), "results.md": text}
        for name, content in files.items():
            with replacing(self.out / name) as file:
                file.write(content.encode())
        with replacing(self.out / "pictures.png") as file:
            Image.fromarray(self._pictures()).save(file, format="png")
        return f"{text}\nwritten: {', '.join(str(self.out / name) for name in (*files, 'pictures.png'))}"

    def _csv(self, results: dict[tuple[str, str, int], dict[str, Any]]) -> str:
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(("mismatch", "method", "seed", *FIGURES))
        writer.writerows((*cell, *(figures[name] for name in FIGURES)) for cell, figures in results.items())
        return lines.getvalue()

    def _table(self, results: dict[tuple[str, str, int], dict[str, Any]]) -> str:
        """Markdown: mean ± standard deviation over the seeds, between untranslated sources and real images."""
        lines = ["| mismatch | method | " + " | ".join(FIGURES) + " | worst flip |", "|---" * (len(FIGURES) + 3) + "|"]
        some = next(iter(results.values()))
        for name, figures in (("untranslated", some["baseline"]), ("real images (ceiling)", some["ceiling"])):
            cells = [f"{figures[f] * scale:.1f}" if f in figures else "" for f, scale in FIGURES.items()]
            lines.append(f"| | {name} | {' | '.join(cells)} | |")
        for strength in STRENGTHS:
            for method in self.methods:
                runs = [figures for cell, figures in results.items() if cell[:2] == (strength, method)]
                cells = [mean_spread([run[f] * scale for run in runs]) for f, scale in FIGURES.items()]
                lines.append(f"| {strength} | {method} | {' | '.join(cells)} | {_worst(runs)} |")
        return "\n".join(lines) + "\n"

    def _pictures(self) -> np.ndarray:
        """Rows of scenes: source | each method, by its first seed | the true target; a block for each strength."""
        rows = []
        for strength in STRENGTHS:
            root = str(self.out / "data" / strength)
            sources, targets = (Samples(root, "test", domain) for domain in ("source", "target"))
            translators = [load_translator(self.run_dir(strength, method, 0)) for method in self.methods]
            for place in range(0, len(sources), len(sources) // PICTURE_ROWS)[:PICTURE_ROWS]:
                source = sources.read(place)[0]
                translations = [translator(source) for translator in translators]
                rows.append(stack([source, *translations, targets.read(place)[0]], axis=1))
        return stack(rows, axis=0)


def _last_evaluation(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "evaluations.jsonl").read_text().splitlines()[-1])


def _worst(runs: Sequence[dict[str, Any]]) -> str:
    """The pair of classes that costs most pixels on average over the runs."""
    shares: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run in runs:
        for flip in run["flips"]:
            shares.setdefault((flip["true"], flip["seen"]), []).append((flip["of_all"], flip["excess"]))
    (true, seen), worst = max(shares.items(), key=lambda item: sum(of_all for of_all, _ in item[1]))
    return f"{true} → {seen} {sum(excess for _, excess in worst) / len(runs):.0%} of {true}"
