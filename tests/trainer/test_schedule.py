import pytest

from infra.errors import UserError
from trainer.schedule import lr_factor


def test_linear_is_flat_and_then_falls_evenly_and_never_to_zero() -> None:
    factors = [lr_factor("linear", epoch, 3, 4) for epoch in range(1, 8)]
    assert factors == pytest.approx([1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_step_divides_by_ten() -> None:
    assert [lr_factor("step", epoch, 0, 0, step_epochs=2) for epoch in range(1, 6)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )


def test_cosine_falls_from_one_to_zero() -> None:
    assert [lr_factor("cosine", epoch, 4, 0) for epoch in (1, 3, 5)] == pytest.approx([1, 0.5, 0])


def test_poly_falls_to_zero_with_the_power_of_nine_tenths() -> None:
    factors = [lr_factor("poly", 1, 3, 1, progress=progress) for progress in (0, 0.25, 0.5, 1)]
    assert factors == pytest.approx([1, 0.75**0.9, 0.5**0.9, 0])


def test_unknown_schedule() -> None:
    with pytest.raises(UserError, match="schedule plateau does not exist: choose one of linear, step, cosine, poly"):
        lr_factor("plateau", 1, 1, 1)
