"""L_robust: against plain loops of its formulas, its weight, and when it and G begin."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer import drawn
from tests.trainer.small import small_method
from tests.trainer.test_methods import TAPS, Pairs, at, close, make, pairs, play
from trainer.draws import Draws
from trainer.engines import Engine, EngineConfig
from trainer.methods import Cut, Srunit
from trainer.optim import OptimConfig
from trainer.step import train_step

pytestmark = pytest.mark.slow


def slow_robustness(method: Srunit, batch: Pairs, draws: Draws) -> Tensor:
    """Eqn. 3 of SRUNIT, one image, one layer and one patch at a time."""
    layers, config = method.generator.model, method.config
    terms = []
    for k, tap in enumerate(config.taps):
        distances = []
        for i in range(len(batch.source)):
            feature = layers[: tap + 1](batch.source[i : i + 1])
            normal, uniform = drawn.noise(draws, tap, batch.slots[i : i + 1], feature)
            norm = 1e-7 + (config.robust.T - 1e-7) * uniform
            tau = norm * normal / normal.norm(dim=1, keepdim=True)
            again = layers[: tap + 1](layers[tap + 1 :](feature + tau))
            width = feature.shape[3]
            for place in drawn.patch_ids(draws, "robust", tap, feature.shape[2] * width, config.patches).tolist():
                y, x = divmod(place, width)
                head = method.heads.get_submodule(f"mlp_{k}")
                rows = [head(each[0, :, y, x]) + 1e-12 for each in (feature, again)]
                unit = [row / row.norm() for row in rows]
                # 1e-12: a root has no gradient at 0.
                distances.append(((unit[0] - unit[1]).square().sum() + 1e-12).sqrt() / norm[0, 0, y, x])
        terms.append(torch.stack(distances).mean())
    return torch.stack(terms).mean()


def check_against(slow_loss: Callable[[Srunit, Pairs, Draws], Tensor], **options: Any) -> None:
    """L_robust and what it adds to every gradient are those of the plain loop."""
    method, batch, context = make(patches=6, buffer=0, robust__beta=1.0, **options), pairs(2), at()
    without = play(make(patches=6, buffer=0, robust__beta=0.0), batch, context)
    with_it = play(method, batch, context)
    method.zero_grad()
    slow = slow_loss(method, batch, context.draws)
    slow.backward()
    assert float(with_it[0]["robust"]) == pytest.approx(slow.item(), rel=1e-9)
    for name, parameter in method.named_parameters():
        if parameter.grad is not None:
            added = with_it[1][name] - without[1][name]
            assert torch.allclose(added, parameter.grad, rtol=1e-5, atol=1e-8 * slow.item()), name


def test_the_ragged_robustness_is_the_plain_loop_of_equation_3() -> None:
    check_against(slow_robustness)


def slow_relative(method: Srunit, batch: Pairs, draws: Draws) -> Tensor:
    """1/K sum_k |sg(F_k(G(x))) - F_k(G(x + tau))| / r with |tau| = r |f|, one image, one layer and one patch at a time."""
    layers, config = method.generator.model, method.config
    terms = []
    for k, tap in enumerate(config.taps):
        distances = []
        for i in range(len(batch.source)):
            image = batch.source[i : i + 1]
            feature, translated = layers[: tap + 1](image), layers[: tap + 1](layers(image))
            normal, uniform = drawn.noise(draws, tap, batch.slots[i : i + 1], feature)
            share = 0.1 + 0.3 * uniform
            length = feature.square().sum(dim=1, keepdim=True).sqrt().detach()
            again = layers[: tap + 1](
                layers[tap + 1 :](feature + share * length * normal / normal.norm(dim=1, keepdim=True))
            )
            width = feature.shape[3]
            for place in drawn.patch_ids(draws, "robust", tap, feature.shape[2] * width, config.patches).tolist():
                y, x = divmod(place, width)
                head = method.heads.get_submodule(f"mlp_{k}")
                rows = [head(each[0, :, y, x]) + 1e-12 for each in (translated, again)]
                constant, unit = [row / row.norm() for row in rows]
                distances.append(((constant.detach() - unit).square().sum() + 1e-12).sqrt() / share[0, 0, y, x])
        terms.append(torch.stack(distances).mean())
    return torch.stack(terms).mean()


def test_the_relative_rule_is_the_plain_loop_of_its_formula() -> None:
    check_against(slow_relative, robust__rule="relative", robust__least_relative=0.1, robust__most_relative=0.4)


@pytest.mark.parametrize(
    ("name", "options", "weight"),
    [
        ("srunit", {}, 0.0138),  # the paper's: beta 1e-4 ln(1e6) / 0.1
        ("srunit", {"robust__per_step": "one"}, 0.00276),
        ("srunit", {"robust__per_step": "one", "robust__taps": (0, 16)}, 0.00691),
        ("srunit-released", {}, 1.84),  # 1e-3 ln(1e4) / 1e-3 / 5
        ("srunit", {"robust__rule": "relative"}, 0.000512),  # ln(10) / 0.45, whatever T is
        ("srunit", {"robust__rule": "relative", "robust__T": 0.2, "robust__beta": 1.0}, 5.12),
    ],
)
def test_the_effective_weight_of_robustness(name: str, options: dict[str, Any], weight: float) -> None:
    method = small_method(name, **options)
    (robust,) = method.parts
    assert robust.effective_weight == pytest.approx(weight, rel=2e-3)
    assert method.notes()[0].startswith(f"L_robust: effective weight {weight:.3g} (beta ")


def test_what_is_logged_of_the_released_options() -> None:
    assert small_method("srunit-released", robust__start=0.25).notes() == [
        "L_robust: effective weight 1.84 (beta 0.001 x E[1/norm] 9211 x 1 of 5 taps per step)",
        "G and its heads rest for the first 0.25 of all epochs, in which D alone is trained",
    ]
    assert small_method("srunit", robust__beta=0.0).notes() == small_method("cut").notes() == []


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_g_rests_until_robustness_begins_and_d_does_not(micro_batches: int) -> None:
    def train(progress: float, **options: Any) -> tuple[list[dict[str, Tensor]], Cut]:
        method, engine = make(buffer=0, **options), Engine(EngineConfig(device="cpu", precision="fp32"))
        engine.prepare(method, OptimConfig(global_batch=2, accumulation=micro_batches))
        size, losses = 2 // micro_batches, []
        for step in range(2):
            batch = pairs(2, seed=step)
            parts = [batch[i : i + size] for i in range(0, 2, size)]
            losses.append(train_step(method, engine, parts, at(step, progress)))
        return losses, method

    rests: dict[str, Any] = {"robust__rest": True, "robust__start": 0.5}
    before = dict(make().named_parameters())
    plain, resting, awake = train(0.4), train(0.4, **rests), train(0.5, **rests)
    alone = ["D_fake", "D_real", "acc/D_fake", "acc/D_real", "norm/discriminator"]
    assert [sorted(losses) for losses in resting[0]] == [alone] * 2
    for name, parameter in resting[1].named_parameters():
        still = name.split(".")[0] in ("generator", "heads", "product")
        assert torch.equal(parameter, before[name]) == still, name
    # D has seen what it would see of a G that has not moved yet.
    assert all(torch.equal(resting[0][0][name], plain[0][0][name]) for name in ("D_fake", "D_real"))
    assert not torch.equal(resting[0][1]["D_fake"], plain[0][1]["D_fake"])
    for losses, expected in zip(awake[0], train(0.5, robust__start=0.5)[0], strict=True):
        close(losses, expected, 0.0)


def test_g_rests_without_robustness_too() -> None:
    (alone, g) = make(robust__beta=0.0, robust__rest=True).phases
    assert (alone.start, g.start) == (0, 0.25)


def test_one_tap_per_step_is_that_tap_divided_by_all_of_them() -> None:
    batch, chosen = pairs(2), set()
    one = make(robust__per_step="one")
    for step in range(8):
        tap = TAPS[drawn.choice(Draws(0, step), "robust", len(TAPS))]
        chosen.add(tap)
        alone = make(robust__taps=(tap,))
        named, _ = play(one, batch, at(step))
        assert float(named["robust"]) == pytest.approx(float(play(alone, batch, at(step))[0]["robust"]) / len(TAPS))
    assert len(chosen) > 1


def test_robustness_begins_at_its_start() -> None:
    method, batch = make(robust__start=0.25), pairs(1)
    before, at_start = (play(method, batch, at(progress=share)) for share in (0.2499, 0.25))
    assert "robust" not in before[0] and float(at_start[0]["robust"]) > 0
    assert not torch.equal(before[1]["generator.model.1.weight"], at_start[1]["generator.model.1.weight"])
    assert "robust" not in play(make("cut"), batch, at())[0]


def test_the_reported_sum_of_g_leaves_robustness_out_and_the_gradient_does_not() -> None:
    batch = pairs(1)
    named, _ = play(make(lambda_gan=0.5, robust__beta=0.3), batch, at())
    assert float(named["G"]) == pytest.approx(float(named["G_GAN"] + (named["NCE"] + named["NCE_Y"]) / 2))
    method = make(lambda_gan=0.5, robust__beta=0.3)
    total, _ = method.loss("generator", method(batch, at()), batch, at())
    assert total.item() == pytest.approx(float(named["G"] + 0.3 * named["robust"]))
