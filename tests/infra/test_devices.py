"""What a machine's processor is taken to be good at."""

import pytest
import torch

from infra import devices


@pytest.mark.parametrize(
    ("amx", "avx512", "intel", "fast"),
    [(True, True, True, True), (False, True, True, False), (False, True, False, True), (False, False, False, False)],
)
def test_bf16_counts_where_it_is_faster(
    amx: bool, avx512: bool, intel: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(devices, "_is_intels", lambda: intel)
    assert devices.has_fast_bf16() == fast
