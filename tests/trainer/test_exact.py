"""What a GPU is told about rounding fp32 to TF32. The settings exist in every build of torch."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from trainer.engines.base import _tune_cuda
from trainer.exact import exact_arithmetic
from trainer.segmentation.segmenter import Segmenter


def settings() -> dict[str, Any]:
    return {
        "products": torch.backends.cuda.matmul.allow_tf32,
        "convolutions": torch.backends.cudnn.conv.fp32_precision == "tf32",  # type: ignore[attr-defined]
        "cuDNN": torch.backends.cudnn.allow_tf32,
        "by speed": torch.backends.cudnn.benchmark,
        "deterministic": torch.backends.cudnn.deterministic,
    }


@pytest.fixture(params=[True, False], ids=["tf32", "no tf32"])
def tf32(request: pytest.FixtureRequest) -> Iterator[bool]:
    """As an engine on a GPU leaves it."""
    products, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    _tune_cuda(request.param)
    yield request.param
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cudnn.allow_tf32 = True


def test_the_engine_rounds_everything_or_nothing(tf32: bool) -> None:
    expected = dict.fromkeys(["products", "convolutions", "cuDNN"], tf32)
    assert settings() == expected | {"by speed": True, "deterministic": False}


def test_judging_rounds_nothing_and_leaves_all_as_it_was(tf32: bool) -> None:
    before = settings()
    exact = dict.fromkeys(before, False) | {"deterministic": True}
    with pytest.raises(ZeroDivisionError), exact_arithmetic():
        assert settings() == exact
        raise ZeroDivisionError
    assert settings() == before


def test_threads_that_leave_in_another_order_leave_all_as_it_was(tf32: bool) -> None:
    before, second_in, first_out = settings(), threading.Event(), threading.Event()

    def second() -> None:
        with exact_arithmetic():
            second_in.set()
            assert first_out.wait(30)

    with ThreadPoolExecutor(1) as pool:
        with exact_arithmetic():
            done = pool.submit(second)
            assert second_in.wait(30)
        assert settings() == dict.fromkeys(before, False) | {"deterministic": True}
        first_out.set()
        done.result(30)
    assert settings() == before


def test_a_segmenter_judges_exactly(tf32: bool) -> None:
    seen = []

    def logits(x: torch.Tensor) -> torch.Tensor:
        seen.append(settings())
        return x.new_zeros(1, 2, 4, 4)

    Segmenter(logits, name="simulated", input_size=None, mean=(0,) * 3, std=(1,) * 3, scale=1, trainids=(0, 1))(
        np.zeros((4, 4, 3), np.uint8)
    )
    assert seen == [dict.fromkeys(seen[0], False) | {"deterministic": True}]
