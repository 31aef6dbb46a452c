"""SRC: hDCE and the semantic relation, as a game of their own and in a method."""

import pytest
import torch
from torch import Tensor

from infra.errors import UserError
from launch.runs.config import make_config
from tests.trainer.small import method_config
from tests.trainer.test_methods import at, make, pairs, play, with_gradient
from trainer.losses import hard_negative_weights, hdce, relation_loss
from trainer.methods.src import SrcConfig


def rows(count: int, seed: int = 0) -> Tensor:
    draw = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(draw, dim=1)


def test_each_image_has_its_own_negatives_and_relations() -> None:
    query, key = rows(10), rows(10, 1)
    together = hdce(query, key, hard_negative_weights(key, 2, 0.5))
    apart = [hdce(q, k, hard_negative_weights(k, 1, 0.5)) for q, k in zip(query.split(5), key.split(5), strict=True)]
    torch.testing.assert_close(together, torch.cat(apart))
    each = [relation_loss(q, k, 1) for q, k in zip(query.split(5), key.split(5), strict=True)]
    torch.testing.assert_close(relation_loss(query, key, 2), torch.stack(each).mean())


def test_the_hardest_negative_has_weight_1_and_a_large_gamma_makes_all_alike() -> None:
    for gamma in (0.1, 1.0, 50.0):
        weights = hard_negative_weights(rows(8), 1, gamma)[0]
        assert torch.equal(weights.amax(dim=1), torch.ones(8, dtype=torch.float64))
    others = ~torch.eye(8, dtype=torch.bool)
    least = [float(hard_negative_weights(rows(8), 1, gamma)[0][others].min()) for gamma in (50.0, 0.1)]
    assert least[0] > 0.95 and least[1] < 1e-3


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(precision: torch.dtype) -> None:
    query, key = rows(8).to(precision), rows(8, 1).to(precision)
    for loss in (lambda q, k: hdce(q, k, hard_negative_weights(k, 1, 50.0)), lambda q, k: relation_loss(q, k, 1)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(query, key)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(query.float(), key.float()))


def test_gamma_falls_evenly_and_may_step_to_1() -> None:
    config = SrcConfig(gamma=50.0, gamma_end=10.0)
    assert [config.gamma_at(share) for share in (0.0, 0.5, 1.0)] == [50.0, 30.0, 10.0]
    stepped = SrcConfig(gamma=50.0, gamma_end=10.0, gamma_step=0.5)
    assert [stepped.gamma_at(share) for share in (0.25, 0.5, 0.75)] == [40.0, 1.0, 1.0]


def test_gamma_of_the_schedule_reaches_the_loss() -> None:
    method, batch = make("src", gamma=2.0, gamma_end=0.05), pairs(1)
    early, late = (play(method, batch, at(progress=share))[0] for share in (0.0, 0.99))
    assert float(early["hDCE"]) != pytest.approx(float(late["hDCE"]), rel=1e-3)
    assert float(early["SRC"]) == pytest.approx(float(late["SRC"]))


def test_the_weights_weigh_and_0_leaves_the_relation_out() -> None:
    batch = pairs(2)
    one, other = (play(make("src", lambda_hdce=0.1 * k, lambda_src=0.2 * k), batch, at())[0] for k in (1, 3))
    for name in "hDCE", "hDCE_Y", "SRC":
        assert float(other[name]) == pytest.approx(3 * float(one[name]))
    assert float(one["G"]) == pytest.approx(float(one["G_GAN"] + (one["hDCE"] + one["hDCE_Y"]) / 2 + one["SRC"]))
    without = play(make("src", lambda_src=0.0, identity=False), batch, at())[0]
    assert {"SRC", "hDCE_Y", "NCE"}.isdisjoint(without)
    assert float(without["G"]) == pytest.approx(float(without["G_GAN"] + without["hDCE"]))


def test_it_trains_generator_and_heads_on_maps_smaller_than_the_patches_asked_for() -> None:
    method = make("src", patches=256)
    play(method, pairs(1), at())
    assert with_gradient(method) == {"generator", "heads", "discriminator"}


def test_presets_are_those_of_the_published_scripts() -> None:
    horses, cities = (
        make_config({"method.name": "src", "task": task}).method for task in ("horse2zebra", "label2city")
    )
    for method, weight, after in (horses, 0.05, [50.0, 10.0]), (cities, 0.1, [50.0, 1.0]):
        assert isinstance(method, SrcConfig)
        assert (method.lambda_hdce, method.lambda_src) == (0.1, weight)
        assert [method.gamma_at(0.0), method.gamma_at(1.0)] == after


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("lambda_hdce", 0.0, "hDCE trains the heads"),
        ("lambda_src", -1.0, "0 or more"),
        ("gamma", 0.0, "positive"),
        ("gamma_end", -1.0, "positive"),
        ("gamma_step", 1.5, "share of the epochs"),
        ("patches", 1, "2 or more"),
        ("lambda_nce", 1.0, "unknown option"),
    ],
)
def test_impossible_options_are_refused(option: str, value: float, said: str) -> None:
    with pytest.raises(UserError, match=said):
        method_config("src", **{option: value})
