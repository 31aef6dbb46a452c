"""The cost model of a step, on round numbers."""

import pytest

from launch.benchmarks.prediction import CALL_S, FUSED, KERNEL_S, Card, predict

CARD = Card("round", flops=1e12, bytes=1e9, reached_flops=1.0, reached_bytes=1.0)


def test_products_take_the_longer_of_flops_and_bytes_and_the_rest_its_bytes() -> None:
    calls, moved = {"convolution": 10, "norm": 10, "cast": 4}, {"convolution": 10**9, "norm": 2 * 10**9, "cast": 0}
    found = predict(CARD, calls, moved, 3e12)
    assert found.device == pytest.approx(3 + 2 + 4 * KERNEL_S)
    assert found.fused == pytest.approx(3 + FUSED * (2 + 4 * KERNEL_S))
    assert predict(CARD, calls, moved, 0.5e12).device == pytest.approx(1 + 2 + 4 * KERNEL_S)


def test_a_step_in_eager_mode_is_no_faster_than_its_host() -> None:
    found = predict(CARD, {"other": 1000}, {"other": 0}, 0.0)
    assert found.host == pytest.approx(1000 * CALL_S) and found.eager == found.host > found.device
