"""The rows of the ablation tables, and options that do not go together."""

from typing import Any

import pytest

from infra.errors import UserError
from tests.trainer.small import method_config
from tests.trainer.test_ablations import engine_of
from tests.trainer.test_methods import Pairs, at, make, pairs
from trainer.methods import ABLATIONS, MethodConfig
from trainer.step import train_step

pytestmark = pytest.mark.slow


def build_row(options: dict[str, Any], **others: Any) -> MethodConfig:
    given = {name.removeprefix("method."): value for name, value in options.items()}
    name = given.pop("name")
    return method_config(name, **{"patches": 20} | given | others)


ROWS = [(table, row) for table, rows in ABLATIONS.items() for row in rows]


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_every_row_trains_in_bf16(table: str, row: str) -> None:
    options: dict[str, Any] = ABLATIONS[table][row]
    small = {"bank.size": min(64, options.get("method.bank.size", 0)), "generator.ngf": 2, "discriminator.ndf": 2}
    method = build_row(options, **small).build(seed=0, global_batch=4)
    engine = engine_of(method, 1, "bf16")
    for step, progress in enumerate((0.0, 1.0)):
        batch = pairs(2, seed=step)
        single = Pairs(batch.source.float(), batch.target.float(), batch.slots)
        losses = train_step(method, engine, [single], at(step, progress))
        assert all(loss.isfinite() for loss in losses.values()), losses


def test_the_rows_of_a_table_are_different_methods() -> None:
    for rows in ABLATIONS.values():
        configs = [build_row(options) for options in rows.values()]
        assert all(one != other for i, one in enumerate(configs) for other in configs[:i])
    assert list(ABLATIONS["srunit"]) == ["CUT", "E1", "E2", "E3", "E4", "E5", "E6", "SRUNIT"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"constraint__smoothness": -1.0}, "method.constraint.* are weights"),
        ({"constraint__start": 1.5}, "method.constraint.start = 1.5 is a share"),
        ({"constraint__self_distance": 1.0, "constraint__start": 0.0}, "give a start above 0"),
        ({"bank__size": -1}, "method.bank.size counts patches"),
        ({"bank__momentum": 1.1}, "method.bank.momentum is a share"),
        ({"bank__internal": False}, "method.bank.internal false leaves no negatives"),
        ({"bank__internal": False, "bank__size": 8, "all_negatives": True}, "leave one of them out"),
        ({"separate_encoder": True, "all_negatives": True}, "leave one of them out"),
    ],
)
def test_what_does_not_go_together_is_said_in_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence.replace("*", r"\*")):
        make(**options)
