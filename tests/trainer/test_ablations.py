"""The ablations of SRUNIT and CUT as options of Cut: against plain loops, whom each trains, for any cut of the batch, and
through a checkpoint."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer import drawn
from tests.trainer.test_methods import Pairs, Ranks, at, close, make, pairs, play
from trainer.checkpoint import Checkpoint
from trainer.checkpointer import Checkpointer
from trainer.draws import Draws
from trainer.engines import Engine, EngineConfig
from trainer.losses import patch_nce, self_distances, smoothness_loss
from trainer.methods import Cut, Srunit
from trainer.methods.base import Method, StepContext
from trainer.optim import OptimConfig
from trainer.state import collect_state, restore_state
from trainer.step import train_step

pytestmark = pytest.mark.slow

Gradients = dict[str, Tensor]


def backbone(**options: Any) -> Srunit:
    return make(**{"patches": 6, "buffer": 0, "robust__beta": 0.0, **options})


def added(method: Cut, batch: Pairs, context: StepContext) -> tuple[dict[str, Tensor], Gradients]:
    """The losses of a method, and the part of its gradient that the backbone does not have."""
    losses, gradients = play(method, batch, context)
    without = play(backbone(), batch, context)[1]
    return losses, {name: gradients[name] - without[name] for name in without}


def reached(gradients: Gradients) -> set[str]:
    return {name.split(".")[0] for name, gradient in gradients.items() if gradient.abs().max() > 1e-12}


def measure(method: Cut, *batches: Pairs) -> None:
    """Steps before the constraints' start, in which E1 takes its statistics."""
    with torch.no_grad():
        for step, batch in enumerate(batches):
            method.after_step([batch], at(step, progress=0.0))


# ---- SRUNIT, E3 to E5: patches of features, one image, one layer and one patch at a time --------------------------------


def slow_patches(method: Cut, batch: Pairs, stream: str, distance: Callable[..., Tensor]) -> Tensor:
    """The mean over layers, images and patches of a distance of (layer, image's slot, place, G_1^k(x), G_1^k(G(x)))."""
    layers, means = method.generator.model, []
    for k, tap in enumerate(method.config.taps):
        terms = []
        for x, slot in zip(batch.source, batch.slots, strict=True):
            feature = layers[: tap + 1](x[None])
            translated = layers[: tap + 1](layers(x[None]))
            places = drawn.patch_ids(Draws(0, 0), stream, tap, feature[0, 0].numel(), method.config.patches)
            terms += [distance(k, slot[None], divmod(int(i), feature.shape[3]), feature, translated) for i in places]
        means.append(torch.stack(terms).mean())
    return torch.stack(means).mean()


def projected(method: Cut, k: int, feature: Tensor, place: tuple[int, int]) -> Tensor:
    row = method.heads.get_submodule(f"mlp_{k}")(feature[0, :, place[0], place[1]]) + 1e-12
    return row / row.norm()


def perturbed(method: Srunit, k: int, slot: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
    """G_1^k of the translation of a perturbed feature, and the norm of the perturbation."""
    tap, layers = method.config.taps[k], method.generator.model
    normal, uniform = drawn.noise(Draws(0, 0), tap, slot, feature)
    norm = 1e-7 + (method.config.robust.T - 1e-7) * uniform
    again = layers[: tap + 1](layers[tap + 1 :](feature + norm * normal / normal.norm(dim=1, keepdim=True)))
    return again, norm


def away(one: Tensor, other: Tensor) -> Tensor:
    return ((one - other).square().sum() + 1e-12).sqrt()  # 1e-12: a root has no gradient at 0


def e3(method: Srunit, k: int, slot: Tensor, place: tuple[int, int], feature: Tensor, translated: Tensor) -> Tensor:
    again, norm = perturbed(method, k, slot, feature)
    y, x = place
    return away(feature[0, :, y, x], again[0, :, y, x]) / norm[0, 0, y, x]


def e4(method: Srunit, k: int, slot: Tensor, place: tuple[int, int], feature: Tensor, translated: Tensor) -> Tensor:
    again, norm = perturbed(method, k, slot, feature)
    return away(projected(method, k, translated, place), projected(method, k, again, place)) / norm[0, 0, *place]


def e5(method: Cut, k: int, slot: Tensor, place: tuple[int, int], feature: Tensor, translated: Tensor) -> Tensor:
    return away(projected(method, k, feature, place), projected(method, k, translated, place))


@pytest.mark.parametrize(
    ("options", "name", "distance", "networks"),
    [
        ({"robust__beta": 1.0, "robust__semantics": "features"}, "robust", e3, {"generator"}),
        ({"robust__beta": 1.0, "robust__reference": "translation"}, "robust", e4, {"generator", "heads"}),
        ({"constraint__consistency": 1.0}, "consistency", e5, {"generator", "heads"}),
    ],
)
def test_e3_to_e5_are_the_plain_loop(
    options: dict[str, Any], name: str, distance: Callable[..., Tensor], networks: set[str]
) -> None:
    method, batch = backbone(**options), pairs(2)
    losses, gradients = added(method, batch, at())
    method.zero_grad()
    slow = slow_patches(method, batch, name, lambda *patch: distance(method, *patch))
    slow.backward()
    assert losses[name].item() == pytest.approx(slow.item(), rel=1e-9)
    assert reached(gradients) == networks
    for parameter_name, parameter in method.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(gradients[parameter_name], expected, rtol=1e-5, atol=1e-8 * slow.item()), parameter_name


# ---- SRUNIT, E1, E2 and E6 ----------------------------------------------------------------------------------------------


def test_e1_measures_both_domains_first_and_trains_g_alone() -> None:
    method, batch = backbone(constraint__self_distance=2.0), pairs(2)
    seen = [pairs(3, seed=seed) for seed in (5, 6)]
    measure(method, *seen)
    losses, gradients = added(method, batch, at(progress=0.25))
    source, target = (torch.cat([self_distances(getattr(p, domain)) for p in seen]) for domain in ("source", "target"))
    made = self_distances(method.generator(batch.source))
    scaled_x = (self_distances(batch.source) - source.mean()) / source.std(correction=0)
    scaled_y = (made - target.mean()) / target.std(correction=0)
    expected = (scaled_x - scaled_y).abs().mean()
    assert losses["self_distance"].item() == pytest.approx(expected.item())
    method.zero_grad()
    (2 * expected).backward()
    assert reached(gradients) == {"generator"}
    for name, parameter in method.generator.named_parameters():
        torch.testing.assert_close(gradients[f"generator.{name}"], parameter.grad, rtol=1e-6, atol=1e-9)


def test_the_statistics_of_e1_stand_still_from_its_start_on() -> None:
    method = backbone(constraint__self_distance=1.0)
    measure(method, pairs(3))
    before = copy.deepcopy(method.memory().state_dict())
    with torch.no_grad():
        method.after_step([pairs(3, seed=1)], at(1, progress=0.25))
    close(method.memory().state_dict(), before, 0)


def test_e2_compares_pairs_of_patches_and_trains_g_alone() -> None:
    method, batch = backbone(constraint__smoothness=3.0, patches=256), pairs(2)
    losses, gradients = play(method, batch, at())
    corners = drawn.patch_ids(Draws(0, 0), "smoothness", 0, 25 * 25, 256)
    expected = smoothness_loss(batch.source, method.generator(batch.source), corners)
    assert losses["smoothness"].item() == pytest.approx(expected.item()) and len(corners) == 256
    without = play(backbone(patches=256), batch, at())[1]
    assert reached({name: gradients[name] - without[name] for name in without}) == {"generator"}
    more = backbone(constraint__smoothness=1.0, patches=10_001)  # more than there are places, and an odd number
    assert play(more, pairs(1, size=24), at())[0]["smoothness"] > 0


def test_e2_sees_the_source_as_g_saw_it() -> None:
    method, batch = backbone(constraint__smoothness=1.0, flip_equivariance=True), pairs(1)
    mirrored = Pairs(batch.source.flip(3), batch.target.flip(3), batch.slots)
    steps = [next(step for step in range(100) if drawn.coin(Draws(0, step), "flip") == side) for side in (True, False)]
    there, here = (at(step) for step in steps)
    corners = drawn.patch_ids(there.draws, "smoothness", 0, 25 * 25, 6)
    expected = smoothness_loss(mirrored.source, method.generator(mirrored.source), corners)
    assert play(method, batch, there)[0]["smoothness"].item() == pytest.approx(expected.item())
    assert play(method, mirrored, here)[0]["smoothness"].item() != pytest.approx(expected.item())  # other corners


def test_e6_is_the_slope_of_d_at_source_and_translation_and_trains_d_alone() -> None:
    method, batch = backbone(constraint__lipschitz=2.0), pairs(2)
    losses, gradients = added(method, batch, at())
    total = torch.zeros((), dtype=torch.float64)
    for images in (batch.source, method.generator(batch.source).detach()):
        for image in images:
            image = image[None].clone().requires_grad_()
            (slope,) = torch.autograd.grad(method.discriminator(image).mean(), image, create_graph=True)
            total = total + slope.square().sum().sqrt() / 2
    assert losses["lipschitz"].item() == pytest.approx(total.item())
    method.zero_grad()
    (2 * total).backward()
    assert reached(gradients) == {"discriminator"}
    for name, parameter in method.discriminator.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[f"discriminator.{name}"], parameter.grad, rtol=1e-6, atol=1e-9)


def test_constraints_wait_for_their_start() -> None:
    names = ("self_distance", "smoothness", "consistency", "lipschitz")
    method = backbone(**{f"constraint__{name}": 1.0 for name in names})
    measure(method, pairs(3))
    before, at_start = (play(method, pairs(1), at(progress=share))[0] for share in (0.2499, 0.25))
    assert not set(names) & set(before) and set(names) <= set(at_start)


# ---- CUT ----------------------------------------------------------------------------------------------------------------


def test_separate_encoders_learn_each_their_own_side() -> None:
    method, batch = make("cut", separate_encoder=True, lambda_gan=0.0), pairs(1)
    last = max(method.config.taps)
    # Keys for a head of their own, queries for the other.
    outputs = method(batch, at())
    queries = method.output_encoder.encode(outputs.fake, method.config.taps)
    keys = method.generator.encode(batch.source, method.config.taps)
    ids = [
        drawn.patch_ids(at().draws, "nce", tap, f.shape[2] * f.shape[3], 20)
        for tap, f in zip(method.config.taps, keys, strict=True)
    ]
    rows = zip(method.output_heads(queries, ids), method.heads(keys, ids), strict=True)
    expected = torch.stack([patch_nce(query, key, 1).mean() for query, key in rows]).mean()
    losses, gradients = play(method, batch, at())
    assert losses["NCE"].item() == pytest.approx(expected.item())
    nets = set(method.networks("generator"))
    assert nets == {"generator", "heads", "output_encoder", "output_heads"}
    for name in nets:
        learns = [float(g.abs().max()) for n, g in gradients.items() if n.startswith(f"{name}.")]
        assert learns and any(learns), name
    assert len(method.output_encoder.model) == last + 1
    assert not torch.equal(method.output_encoder.model[1].weight, method.generator.model[1].weight)


@pytest.mark.parametrize("trained", [True, False])
def test_nce_reaches_the_decoder_unless_told_not_to(trained: bool) -> None:
    # At this weight D's judgement teaches nothing, and what is left is PatchNCE.
    method, batch = make("cut", decoder_nce=trained, lambda_gan=0.0), pairs(1)
    gradients = play(method, batch, at())[1]
    decoder = [f"generator.model.{index}." for index in range(17, len(method.generator.model))]
    found = {name for name, g in gradients.items() if name.startswith(tuple(decoder)) and g.any()}
    assert bool(found) == trained
    assert gradients["generator.model.1.weight"].any()


def test_the_bank_keeps_the_newest_patches_of_a_slow_encoder() -> None:
    method = make("cut", bank__size=50, bank__momentum=0.9, taps=(0, 4))
    assert method.bank is not None
    begin = copy.deepcopy(method.bank)
    torch.testing.assert_close(begin.negatives("nce", 4).norm(dim=1), torch.ones(50, dtype=torch.float64))
    with torch.no_grad():
        method.generator.model[1].weight.add_(1.0)
        method.after_step([pairs(2)], at())
    moved = begin.encoder.model[1].weight + 0.1  # a tenth of the way
    torch.testing.assert_close(method.bank.encoder.model[1].weight, moved)
    torch.testing.assert_close(method.bank.encoder.model[4].weight, begin.encoder.model[4].weight)

    for stream, images in (("nce", pairs(2).source), ("identity", pairs(2).target)):
        features = method.bank.encoder.encode(images, (0, 4))
        ids = [
            drawn.patch_ids(at().draws, stream, tap, f[0, 0].numel(), 20)
            for tap, f in zip((0, 4), features, strict=True)
        ]
        for tap, rows in zip((0, 4), method.bank.heads(features, ids), strict=True):
            bank = method.bank.negatives(stream, tap)
            torch.testing.assert_close(bank[10:], rows)
            torch.testing.assert_close(bank[:10], begin.negatives(stream, tap)[40:])


@pytest.mark.parametrize("internal", [True, False])
def test_the_bank_gives_the_negatives(internal: bool) -> None:
    method, batch = make("cut", bank__size=30, bank__internal=internal, taps=(4,)), pairs(2)
    assert method.bank is not None
    losses, gradients = play(method, batch, at())
    features = [method.generator.encode(image, (4,)) for image in (method.generator(batch.source), batch.source)]
    ids = [drawn.patch_ids(at().draws, "nce", 4, features[0][0][0, 0].numel(), 20)]
    query, key = (method.heads(each, ids)[0] for each in features)
    expected = patch_nce(query, key, 2 if internal else 40, external=method.bank.negatives("nce", 4)).mean()
    assert losses["NCE"].item() == pytest.approx(expected.item())
    assert not gradients.keys() & {f"bank.{name}" for name, _ in method.bank.named_parameters()}
    assert not any(name.startswith("bank.") for name in method.networks("generator"))


# ---- any cut of the global batch, any precision, a checkpoint -----------------------------------------------------------

VARIANTS: list[dict[str, Any]] = [
    {f"constraint__{name}": 1.0 for name in ("self_distance", "smoothness", "consistency", "lipschitz")},
    {"robust__beta": 1.0, "robust__semantics": "features"},
    {"robust__beta": 1.0, "robust__reference": "translation"},
    {"separate_encoder": True},
    {"decoder_nce": False},
    {"bank__size": 100, "bank__momentum": 0.5},
    {"bank__size": 100, "bank__internal": False, "identity": False},
]
NAMES = [" ".join(options) for options in VARIANTS]


@pytest.mark.parametrize("options", VARIANTS, ids=NAMES)
def test_two_ranks_equal_one(options: dict[str, Any]) -> None:
    whole = backbone(**options)
    halves, ranks = [copy.deepcopy(whole) for _ in range(2)], Ranks()

    def step_of(method: Cut, batch: Pairs, context: StepContext) -> tuple[dict[str, Tensor], Gradients]:
        result = play(method, batch, context)
        with torch.no_grad():
            method.after_step([batch], context)
        return result

    for step, progress in enumerate((0.0, 1.0)):
        batch = pairs(seed=step)

        def half(
            rank: int, step: int = step, progress: float = progress, batch: Pairs = batch
        ) -> tuple[dict[str, Tensor], Gradients]:
            context = StepContext(Draws(0, step), progress, lambda rows: ranks.gather(rank, rows))
            return step_of(halves[rank], batch[2 * rank : 2 * rank + 2], context)

        with ThreadPoolExecutor(2) as pool:
            parts = list(pool.map(half, range(2)))
        losses, gradients = step_of(whole, batch, at(step, progress))
        close({key: (parts[0][0][key] + parts[1][0][key]) / 2 for key in losses}, losses)
        close({key: (parts[0][1][key] + parts[1][1][key]) / 2 for key in gradients}, gradients)
    for method in halves:
        close(method.memory().state_dict(), whole.memory().state_dict())


def engine_of(method: Method[Any, Any], micro_batches: int, precision: str = "fp32") -> Engine:
    engine = Engine(EngineConfig(device="cpu", precision=precision))
    engine.prepare(method, OptimConfig(global_batch=4, accumulation=micro_batches))
    return engine


def train(method: Cut, engine: Engine, micro_batches: int, steps: range) -> list[dict[str, Tensor]]:
    size, losses = 4 // micro_batches, []
    for step in steps:
        batch = pairs(seed=step)
        parts = [batch[i : i + size] for i in range(0, 4, size)]
        losses.append(train_step(method, engine, parts, at(step, progress=0.0 if step == 0 else 1.0)))
    return losses


@pytest.mark.parametrize("options", VARIANTS, ids=NAMES)
def test_accumulation_equals_one_batch(options: dict[str, Any]) -> None:
    methods, losses = [], []
    for micro_batches in (1, 2):
        method = backbone(**options)
        losses.append(train(method, engine_of(method, micro_batches), micro_batches, range(2)))
        methods.append(method)
    for expected, given in zip(*losses, strict=True):
        close(given, expected, 1e-8)
    close(methods[1].state_dict(), methods[0].state_dict(), 1e-7)
    for spec in methods[0].optimisers:  # as DDP wants it: every parameter of an optimiser takes part in its loss
        assert all(p.grad is not None for p in methods[0].networks(spec.name).parameters()), spec.name


@pytest.mark.parametrize("options", [VARIANTS[0], VARIANTS[3], VARIANTS[5]], ids=["constraints", "separate", "bank"])
def test_a_checkpoint_continues_to_the_bit(options: dict[str, Any], tmp_path: Path) -> None:
    method = backbone(**options)
    engine = engine_of(method, 1)
    train(method, engine, 1, range(2))
    state = collect_state(method, engine, None, 2)
    path = Checkpointer(tmp_path, keep=1).save(2, state.tensors, {"step": 2, "scalers": state.scalers})
    other = make(**{"patches": 6, "buffer": 0, "robust__beta": 0.0, **options}, seed=7)
    other_engine = engine_of(other, 1)
    restore_state(other, other_engine, None, Checkpoint(path))
    close(train(other, other_engine, 1, range(2, 3))[0], train(method, engine, 1, range(2, 3))[0], 0)
    close(other.state_dict(), method.state_dict(), 0)
