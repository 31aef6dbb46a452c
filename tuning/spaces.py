"""What a search varies: fields of the configuration tree, each with a distribution."""

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.config import flatten
from infra.errors import UserError
from launch.runs.config import make_config

if TYPE_CHECKING:  # importing it takes seconds
    from ray.tune.search.sample import Domain

Params = dict[str, Any]  # value by dotted name

PRESETS = {
    # The ranges in which the paper tunes both (SRUNIT, Sec. 5.3).
    "beta-T": ("method.robust.beta=loguniform(1e-5, 1e-3)", "method.robust.T=uniform(0.01, 0.2)"),
    "lr-batch": ("optim.lr=loguniform(5e-5, 1e-3)", "optim.global_batch=choice(1, 2, 4, 8)"),
}
TAPS = "taps"  # a preset that depends on the layers in use
GRID_POINTS = 3  # along a range, where the number of trials is not given
FORMS = {"uniform": "uniform(LOW, HIGH)", "loguniform": "loguniform(LOW, HIGH)", "randint": "randint(LOW, HIGH)",
         "choice": "choice(VALUE, VALUE, …)"}  # fmt: skip


@dataclass(frozen=True)
class Dimension:
    """A field and its distribution. values: lowest and highest value, both possible, or of a choice all of them."""

    field: str
    kind: str
    values: tuple[Any, ...]

    @property
    def is_range(self) -> bool:
        return self.kind != "choice"

    def points(self, count: int) -> list[Any]:
        """Values for a grid: all of a choice, or `count` of a range, evenly spread from end to end."""
        if not self.is_range:
            return list(self.values)
        low, high = self.values
        spread = np.geomspace if self.kind == "loguniform" else np.linspace
        points = [float(point) for point in spread(low, high, count)]
        return sorted({round(point) for point in points}) if self.kind == "randint" else points

    def domain(self) -> "Domain":
        """As Ray Tune knows it."""
        from ray import tune

        if self.kind == "choice":
            return tune.choice(list(self.values))
        low, high = self.values
        return tune.randint(low, high + 1) if self.kind == "randint" else getattr(tune, self.kind)(low, high)

    def place(self, value: Any) -> float:
        """Where a value stands on an axis: a choice's values at 0, 1, …"""
        return float(value if self.is_range else self.values.index(value))


# ---- from the command line ------------------------------------------------------------------------------------------


def parse_space(texts: Sequence[str], layers: Sequence[Mapping[str, Any]]) -> tuple[Dimension, ...]:
    """The dimensions that presets and "FIELD=distribution(…)" name, checked against the configuration tree.

    layers: of options, under those of a trial. UserError for what is unknown, empty, inverted or impossible.
    """
    expanded: list[str] = []
    dimensions: list[Dimension] = []
    for text in texts:
        if text == TAPS:
            dimensions.append(_taps(flatten(make_config(*layers)).get("method.taps", ())))
        else:
            expanded += PRESETS.get(text, (text,))
    dimensions += [_parse_dimension(text) for text in expanded]
    for dimension in dimensions:
        _check(dimension, layers)
    fields = [dimension.field for dimension in dimensions]
    for field in fields:
        if fields.count(field) > 1:
            raise UserError(f"--space names {field} twice: give it one distribution")
    return tuple(dimensions)


def _taps(taps: tuple[int, ...]) -> Dimension:
    """All K layers, or all but one: "We finetune K to be 4 or 5 by leaving one out each time" (SRUNIT, Appendix F)."""
    return Dimension(
        "method.robust.taps", "choice", (taps, *(tuple(t for t in taps if t != left_out) for left_out in taps))
    )


def _parse_dimension(text: str) -> Dimension:
    field, equals, expression = text.partition("=")
    field = field.strip()
    if not equals:
        known = ", ".join((*PRESETS, TAPS))
        raise UserError(f"unknown space {text!r}: choose one of {known}, or give FIELD=loguniform(1e-5,1e-3)")
    try:
        call = ast.parse(expression.strip(), mode="eval").body
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.keywords
        kind, values = call.func.id, tuple(_literal(argument) for argument in call.args)
        if any(isinstance(value, int) and abs(value) > 2**63 for value in values):
            raise ValueError
    except (SyntaxError, AssertionError, ValueError, TypeError):
        raise UserError(f"--space {field} = {expression!r} is no distribution: give one of {_forms()}") from None
    if kind not in FORMS:
        raise UserError(f"--space {field}: {kind} is no known distribution: give one of {_forms()}")
    return Dimension(field, kind, values if kind == "choice" else _range(field, kind, values))


def _literal(argument: ast.expr) -> Any:
    """A number, a text with or without quotation marks, or a tuple of numbers."""
    return argument.id if isinstance(argument, ast.Name) else ast.literal_eval(argument)


def _range(field: str, kind: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    if len(values) != 2 or len(numbers) != 2:
        raise UserError(f"--space {field}: {kind} needs two numbers, the lowest and the highest: give {FORMS[kind]}")
    low, high = numbers
    if low >= high:
        raise UserError(f"--space {field}: the range from {low} to {high} is empty: give the lower end first")
    if kind == "loguniform" and low <= 0:
        raise UserError(f"--space {field}: a loguniform range cannot begin at {low}: begin above 0, or give uniform")
    if kind == "randint":
        if low != int(low) or high != int(high):
            raise UserError(f"--space {field}: randint needs whole numbers, not {low} and {high}: give uniform instead")
        return int(low), int(high)
    return float(low), float(high)


def _forms() -> str:
    return ", ".join(FORMS.values())


def _check(dimension: Dimension, layers: Sequence[Mapping[str, Any]]) -> None:
    """UserError if a trial could not have these values."""
    if dimension.field in ("run_dir", "task", "data.root") or dimension.field.startswith("evaluation."):
        raise UserError(f"{dimension.field} cannot be searched, it is the same for all trials: leave it out of --space")
    if not dimension.values:
        raise UserError(f"--space {dimension.field}: the choice is empty: give {FORMS['choice']}")
    if len(set(map(str, dimension.values))) < len(dimension.values):
        raise UserError(f"--space {dimension.field}: the choice names a value twice: give each once")
    for value in dimension.values:
        make_config(*layers, {dimension.field: value})


# ---- trials ---------------------------------------------------------------------------------------------------------


def grid(space: Sequence[Dimension], trials: int | None) -> dict[str, list[Any]]:
    """The values of each field whose every combination is a trial: all of a choice, and evenly spread points of a range,
    as many as fit in `trials`.

    UserError if not even two points of each range do.
    """
    choices = math.prod(len(dimension.values) for dimension in space if not dimension.is_range)
    ranges = sum(dimension.is_range for dimension in space)
    count = GRID_POINTS
    if trials is not None:
        count = int((trials / choices) ** (1 / ranges) + 1e-9) if ranges else GRID_POINTS
        least = choices * 2**ranges
        if trials < least:
            raise UserError(f"a grid over this space has {least} points or more, not {trials}: give --trials {least}")
    return {dimension.field: dimension.points(count) for dimension in space}


def tupled(params: Mapping[str, Any]) -> Params:
    """Parameters as the configuration tree has them, which knows no lists; Ray keeps its trials in JSON, without tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in params.items()}
