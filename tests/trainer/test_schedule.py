"""The schedule: steps, epochs, learning rates."""

import pytest

from infra.errors import UserError
from trainer.optim import SCHEDULES, OptimConfig
from trainer.schedule import Schedule, lr_factor


@pytest.mark.parametrize(
    ("epochs", "decay", "samples", "batch", "steps"),
    [
        (1, 1, 10, 1, 20), (1, 1, 10, 4, 5), (1, 0, 10, 4, 3), (0.5, 0, 10, 1, 5), (10, 10, 2975, 1, 59500),
        (0.1, 0.2, 1000, 1, 300),  # 0.1 + 0.2 is more than 0.3 in floating point
    ],
)  # fmt: skip
def test_the_steps_cover_all_epochs(epochs: float, decay: float, samples: int, batch: int, steps: int) -> None:
    schedule = Schedule(OptimConfig(epochs=epochs, decay_epochs=decay, global_batch=batch), samples)
    assert schedule.steps == steps
    assert schedule.progress(steps - 1) < 1 <= schedule.progress(steps)


def test_epochs_begin_where_the_source_begins_again() -> None:
    schedule = Schedule(OptimConfig(epochs=2, decay_epochs=1, global_batch=4), 10)
    assert [schedule.epoch(step) for step in range(schedule.steps)] == [1, 1, 1, 2, 2, 3, 3, 3]
    assert schedule.progress(0) == 0 and schedule.progress(3) == pytest.approx(0.4)


def test_an_epoch_may_pass_within_a_step() -> None:
    schedule = Schedule(OptimConfig(epochs=3, decay_epochs=0, global_batch=4), 10)
    assert [done for done in range(1, 9) if schedule.passes(done, 1)] == [3, 5, 8]
    assert [done for done in range(1, 9) if schedule.passes(done, 0.2)] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("every", "steps"), [(1.1, [110, 220, 330]), (0.7, [70, 140, 210, 280]), (0.83, [83, 166, 249])]
)
def test_epochs_that_are_no_binary_fraction_pass_where_they_are_written(every: float, steps: list[int]) -> None:
    schedule = Schedule(OptimConfig(epochs=4, decay_epochs=0), 100)
    assert [done for done in range(1, 332) if schedule.passes(done, every)][: len(steps)] == steps


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 0.7, 1.0])
def test_a_share_of_the_epochs_has_a_first_step(share: float) -> None:
    schedule = Schedule(OptimConfig(epochs=0.6, decay_epochs=0.6, global_batch=3), 1000)
    first = schedule.first_step_at(share)
    assert schedule.progress(first - 1) < share <= schedule.progress(first)


# ---- the learning rate --------------------------------------------------------------------------------------------------


def test_the_rate_falls_at_epoch_boundaries() -> None:
    schedule = Schedule(OptimConfig(epochs=2, decay_epochs=3, lr=1.0), 5)
    rates = [schedule.learning_rate(step) for step in range(25)]
    assert rates == pytest.approx([1] * 10 + [0.75] * 5 + [0.5] * 5 + [0.25] * 5)


def test_linear_is_flat_and_then_falls_evenly_and_never_to_zero() -> None:
    factors = [lr_factor("linear", epoch, 3, 4) for epoch in range(1, 8)]
    assert factors == pytest.approx([1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(("epochs", "decay"), [(0.6, 0.6), (1.5, 1.5), (0.3, 1.0), (2.0, 0.5), (0.0, 0.7)])
def test_linear_over_parts_of_epochs_is_flat_and_then_falls_by_progress_to_its_end(epochs: float, decay: float) -> None:
    schedule = Schedule(OptimConfig(epochs=epochs, decay_epochs=decay, lr=1.0), 1000)
    rates = [schedule.learning_rate(step) for step in range(schedule.steps)]
    flat, falling = round(1000 * epochs), round(1000 * decay)
    assert rates[:flat] == [1.0] * flat
    assert rates[flat:] == pytest.approx([1 - step / falling for step in range(falling)])


def test_linear_without_decay_keeps_its_rate() -> None:
    schedule = Schedule(OptimConfig(epochs=0.3, decay_epochs=0, lr=1.0), 1000)
    assert {schedule.learning_rate(step) for step in range(schedule.steps)} == {1.0}


def test_step_falls_at_once_after_so_many_epochs() -> None:
    assert [lr_factor("step", epoch, 0, 0, step_epochs=2) for epoch in range(1, 6)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )
    schedule = Schedule(
        OptimConfig(epochs=3, decay_epochs=0, lr=1.0, schedule="step", step_epochs=1, step_factor=0.5), 2
    )
    assert [schedule.learning_rate(step) for step in range(schedule.steps)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_cosine_falls_from_one_to_zero_over_all_epochs() -> None:
    schedule = Schedule(OptimConfig(epochs=2, decay_epochs=2, lr=1.0, schedule="cosine"), 100)
    rates = [schedule.learning_rate(step) for step in range(schedule.steps)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[200], rates[-1]) == pytest.approx((1, 0.5, 0), abs=1e-4)


def test_the_published_cosine_climbs_again() -> None:
    factors = [lr_factor("cosine-published", epoch, 4, 4) for epoch in (1, 3, 5, 7, 9)]
    assert factors == pytest.approx([1, 0.5, 0, 0.5, 1])


def test_poly_falls_to_zero_with_the_power_of_nine_tenths() -> None:
    factors = [lr_factor("poly", 1, 3, 1, progress=progress) for progress in (0, 0.25, 0.5, 1)]
    assert factors == pytest.approx([1, 0.75**0.9, 0.5**0.9, 0])


def test_every_schedule_that_is_offered_exists_and_no_other() -> None:
    for kind in SCHEDULES:
        assert lr_factor(kind, 1, 4, 4) == 1
    with pytest.raises(UserError, match=f"schedule plateau does not exist: choose one of {', '.join(SCHEDULES)}"):
        lr_factor("plateau", 1, 1, 1)
