"""The flipping benchmark: data, a segmenter, and many trainings alike, which `launch/flipping.py` runs.

OUT/data/{none,middle,strong}    street scenes; the strength is in the layout of the training targets alone
OUT/data/segmenter               more scenes, whose target images train the segmenter
OUT/segmenter                    its run
OUT/runs/STRENGTH-METHOD-SEED    run folders of the translators
OUT/logs                         output of each training
OUT/results.csv, results.md      metrics of every run; mean and spread
OUT/pictures.png                 test scenes as each method translates them
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from infra.errors import UserError
from infra.storage import replacing
from infra.tables import comma_separated, markdown, spreads
from launch.runs.embedded import LARGE_SEGMENTER, SMALL_SEGMENTER, Setup
from pipelines.dataset import ImageDataset
from trainer.samples import stack
from trainer.translator import load_translator

LAUNCH = Path(__file__).parent
STRENGTHS = {"none": 0.0, "middle": 0.5, "strong": 1.0}
METRICS = {"mIoU": 100, "pxAcc": 100, "clsAcc": 100, "flip_rate": 100, "Dist": 1}  # and what they are multiplied by
PICTURE_ROWS = 3  # scenes of each strength

Cell = tuple[str, str, int]  # strength, method, seed
Results = dict[Cell, dict[str, Any]]

TIERS = {
    "small": Setup(
        LAUNCH / "flipping-small.yaml", (128, 64), (1000, 2000, 100), {**SMALL_SEGMENTER, "optim.epochs": 6.0}
    ),
    "gpu": Setup(LAUNCH / "flipping-gpu.yaml", (256, 128), (4000, 10000, 500), LARGE_SEGMENTER),
}


class Benchmark:
    """betas: SRUNIT's. seeds: runs of each method and strength. parallel: processes at once, which share the cores."""

    def __init__(self, tier: Setup, out: Path, betas: Sequence[float], seeds: int, parallel: int) -> None:
        if seeds < 1 or parallel < 1:
            raise UserError(f"{seeds} seeds and {parallel} trainings at once are impossible: give 1 or more of each")
        if min(betas, default=0) < 0:
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
        for name, mismatch in STRENGTHS.items():
            self.tier.draw(self.out / "data" / name, mismatch)
        self.tier.train_segmenter(self.out / "data" / "segmenter", self.out / "segmenter")
        threads = max(1, (os.cpu_count() or 1) // self.parallel)
        with ThreadPoolExecutor(self.parallel) as pool:
            jobs = [
                pool.submit(self._train, cell, threads)
                for cell in self.cells
                if not (self.run_dir(*cell) / "model").is_dir()  # the last thing that a run leaves
            ]
            try:
                for job in tqdm(as_completed(jobs), "training", len(jobs), unit="run"):
                    job.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _command(self, strength: str, method: str, seed: int) -> list[Any]:
        return [
            LAUNCH / "train.py", "--task", "gta2city", "--config", self.tier.config, *self.methods[method][1],
            "--seed", seed, "--data", self.out / "data" / strength, "--run-dir", self.run_dir(strength, method, seed),
            "--evaluation.segmenter", self.out / "segmenter",
        ]  # fmt: skip

    def _train(self, cell: Cell, threads: int) -> None:
        """UserError with the end of its log if it fails."""
        name = self.run_dir(*cell).name
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with log.open("ab") as output:
            arguments = [sys.executable, *map(str, self._command(*cell))]
            done = subprocess.run(arguments, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
        if done.returncode:
            last = log.read_text().strip().splitlines()[-1:]
            raise UserError(f"{name} failed ({''.join(last)}): see {log}, and run the same command again to continue")

    # ---- what came out ----------------------------------------------------------------------------------------------

    def report(self) -> str:
        """Write the results and say where they are, below the table."""
        results = {cell: _last_evaluation(self.run_dir(*cell)) for cell in self.cells}
        text = self._table(results)
        rows = ((*cell, *(metrics[name] for name in METRICS)) for cell, metrics in results.items())
        runs = comma_separated(("mismatch", "method", "seed", *METRICS), rows)
        files = {"results.csv": runs, "results.md": text}
        for name, content in files.items():
            with replacing(self.out / name) as file:
                file.write(content.encode())
        with replacing(self.out / "pictures.png") as file:
            Image.fromarray(self._pictures()).save(file, format="png")
        return f"{text}\nwritten: {', '.join(str(self.out / name) for name in (*files, 'pictures.png'))}"

    def _table(self, results: Results) -> str:
        """Markdown: mean ± standard deviation over the seeds, between untranslated sources and real images."""
        some = next(iter(results.values()))
        rows = [
            ["", name, *spreads([metrics], METRICS), ""]
            for name, metrics in (("untranslated", some["baseline"]), ("real images (ceiling)", some["ceiling"]))
        ]
        for strength in STRENGTHS:
            for method in self.methods:
                runs = [metrics for cell, metrics in results.items() if cell[:2] == (strength, method)]
                rows.append([strength, method, *spreads(runs, METRICS), _worst(runs)])
        return markdown(("mismatch", "method", *METRICS, "worst flip"), rows) + "\n"

    def _pictures(self) -> np.ndarray:
        """Rows of scenes: source | each method, by its first seed | the true target; a block for each strength."""
        rows = []
        for strength in STRENGTHS:
            root = str(self.out / "data" / strength)
            sources, targets = (ImageDataset(root, "test", domain) for domain in ("source", "target"))
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
