"""What the step benchmark says of each combination: figures, goals and a table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from launch.benchmarks.grid import by_row, grid
from launch.benchmarks.measuring import Figure, Target, ratios
from launch.benchmarks.measuring import table as plain_table
from launch.benchmarks.profiling import KINDS
from launch.benchmarks.work import step_flops
from launch.config import JobConfig


@dataclass(frozen=True)
class Combination:
    """One row of the table. program: "ours" or "published". The others: as on the command line."""

    program: str
    precision: str
    layout: str
    compile: str
    batch: int
    taps: str

    @classmethod
    def published(cls, taps: str) -> "Combination":
        return cls("published", "fp32", "contiguous", "eager", 1, taps)

    @property
    def name(self) -> str:
        if self.program == "published":
            return f"published/{self.taps}"
        return f"{self.precision}/{self.layout}/{self.compile}/b{self.batch}/{self.taps}"


# What the best combination is to reach at full size: name, quantity, what is said of it, part of the combination's name,
# the least.
Goal = tuple[str, str, str, Callable[[str], bool], float]
GOALS: dict[str, list[Goal]] = {
    "cpu": [
        ("fp32", "to_published", "fp32 / published", lambda name: name.startswith("fp32") and name.endswith("all"), 1.15),
        ("bf16", "to_published", "bf16 / published", lambda name: name.startswith("bf16") and name.endswith("all"), 1.8),
    ],
    "cuda": [
        ("batch_1", "to_published", "one pair a step / published", lambda name: "/b1/" in name, 4),
        ("any_batch", "to_published", "any batch / published", lambda name: True, 10),
        ("pairs_per_s", "pairs_per_s", "SRUNIT, one tap", lambda name: name.endswith("one"), 136),
        ("matmul_share_one", "matmul_share", "share of matmul, one tap", lambda name: name.endswith("one"), 0.4),
        ("matmul_share_all", "matmul_share", "share of matmul, all taps", lambda name: name.endswith("all"), 0.4),
    ],
}  # fmt: skip
COLUMNS = {
    "seconds": "s/step", "pairs_per_s": "pairs/s", "to_published": "x published",
    "cpu_seconds": "CPU s", "cpu_to_published": "x in CPU s", "tflops": "TFLOP/s",
    "matmul_share": "of matmul", "peak": "GiB",
    **{f"share_{kind}": kind for kind in KINDS}, "share_waiting": "waiting",
}  # fmt: skip


def figures_of(
    combination: Combination,
    config: JobConfig,
    steps: int,
    answers: Sequence[Mapping[str, float]],
    shares: Mapping[str, float],
    baseline: Sequence[Mapping[str, float]],
) -> list[Figure]:
    """answers, baseline: of `launch.benchmarks.one_step`, ours and the published step's, for each repetition of so many
    steps. shares: of the time of a step."""
    assert config.data.crop
    work = step_flops(config.method, config.model, config.data.crop)
    rates = tuple(steps * combination.batch / answer["seconds"] for answer in answers)
    achieved = tuple(rate * work / 1e12 for rate in rates)
    matmul = tuple(answer["matmul"] for answer in answers)

    cpu_rates = [steps * combination.batch / answer["cpu_seconds"] for answer in answers]

    def figure(name: str, unit: str, *values: float) -> Figure:
        return Figure(f"{combination.name}/{name}", f"{combination.name}: {name}", unit, values)

    return [
        figure("seconds", "s", *(answer["seconds"] / steps for answer in answers)),
        figure("pairs_per_s", "pairs/s", *rates),
        figure("to_published", "", *ratios(rates, [steps / answer["seconds"] for answer in baseline])),
        figure("cpu_seconds", "s", *(answer["cpu_seconds"] / steps for answer in answers)),
        figure("cpu_to_published", "", *ratios(cpu_rates, [steps / answer["cpu_seconds"] for answer in baseline])),
        figure("tflops", "TFLOP/s", *achieved),
        figure("matmul", "TFLOP/s", *matmul),
        figure("matmul_share", "", *ratios(achieved, matmul)),
        figure("peak", "GiB", answers[0]["peak"] / 2**30),
        *(figure(f"share_{kind}", "", share) for kind, share in shares.items()),
        figure("share_waiting", "", *(answer["waiting"] / answer["seconds"] for answer in answers)),
    ]


def goals_of(figures: Sequence[Figure], device: str) -> list[Figure]:
    """The best median among our combinations that each goal speaks of, where there is one."""
    goals = []
    for goal, quantity, says, speaks_of, least in GOALS[device]:
        found = [
            figure
            for figure in figures
            if (name := figure.name.removesuffix("/" + quantity)) != figure.name
            and not name.startswith("published")
            and speaks_of(name)
        ]
        if found:
            best = max(found, key=lambda figure: figure.median)
            label = f"{says} ({best.name.removesuffix('/' + quantity)})"
            goals.append(Figure(f"best/{goal}", label, best.unit, best.values, Target("at least", least)))
    return goals


def table(figures: Sequence[Figure]) -> str:
    """A row for each combination, then the goals."""
    rows = by_row(figures)
    goals = rows.pop("best", {})
    text = grid(rows, COLUMNS)
    return f"{text}\n\n{plain_table([*goals.values()])}" if goals else text
