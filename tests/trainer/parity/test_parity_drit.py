"""Replay of the published DRIT in float64: its networks, losses, whole training steps, initialisation and rates."""

import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from launch.runs.config import make_config
from tests.trainer.parity.changes import Changes, assert_drawn_alike, draws, fill, images, weighted
from tests.trainer.parity.recorded import Recording, assert_same, each
from tests.trainer.parity.replay import Pair
from trainer.draws import Draws
from trainer.engines import EngineConfig, make_engine
from trainer.losses import confusion_loss, multi_scale_loss
from trainer.methods.base import StepContext
from trainer.methods.drit import SLOPE, Drit, DritConfig, DritDiscriminatorConfig, DritGeneratorConfig, Outputs
from trainer.networks.blocks import SpectralConv2d
from trainer.networks.drit import (
    AttributeEncoder,
    ConcatGenerator,
    ContentDiscriminator,
    ContentEncoder,
    FeatureGenerator,
)
from trainer.networks.multi_scale import MultiScaleDiscriminator
from trainer.schedule import lr_factor
from trainer.step import train_step

NETWORKS = {"enc_c": "content_encoder", "enc_a": "attribute_encoder", "gen": "generator", "disA": "discriminator_a",
            "disA2": "discriminator_a2", "disB": "discriminator_b", "disB2": "discriminator_b2",
            "disContent": "content_discriminator"}  # fmt: skip
LOSSES = {"disA": "D_A", "disB": "D_B", "disA2": "D_A2", "disB2": "D_B2", "disContent": "D_content", "gan_a": "G_A",
          "gan_b": "G_B", "gan_acontent": "G_content_A", "gan_bcontent": "G_content_B", "kl_za_a": "kl_A",
          "kl_za_b": "kl_B", "kl_zc_a": "content_A", "kl_zc_b": "content_B", "l1_recon_A": "cycle_A",
          "l1_recon_B": "cycle_B", "l1_recon_AA": "same_A", "l1_recon_BB": "same_B", "l1_recon_z_a": "latent_A",
          "l1_recon_z_b": "latent_B", "gan2_a": "G_A2", "gan2_b": "G_B2", "G": "G", "lz_AB": "seek_B",
          "lz_BA": "seek_A"}  # fmt: skip


def ours(name: str) -> str | None:
    """A published loss's name, which has "_loss" somewhere."""
    return LOSSES.get(name.replace("_loss", ""))


# ---- networks -------------------------------------------------------------------------------------------------------------


def filled(network: nn.Module, recording: Recording, name: str) -> Any:
    fill(network.double(), recording.under(f"{name}/"))
    return network


def compare(recording: Recording, name: str, outputs: list[Tensor], inputs: list[Tensor]) -> None:
    for number, output in enumerate(outputs):
        assert_same(output, recording[f"{name}_out{number}"], 1e-9)
    gradients = torch.autograd.grad(weighted(*outputs), inputs, retain_graph=True)
    for number, gradient in enumerate(gradients):
        assert_same(gradient.float(), recording[f"{name}_grad_in{number}"], 1e-6)


def recorded(recording: Recording, *names: str) -> list[str]:
    """Those of these networks that the file has: the compact one leaves out what the training steps show as well."""
    return [name for name in names if f"{name}_out0" in recording or f"{name}_eval_out0" in recording]


@each("drit_networks*.npz")
def test_encoders(recording: Recording) -> None:
    xs = [recording[key].requires_grad_() for key in ("xa", "xb")]
    for name in recorded(recording, "E_content"):
        ngf = len(recording[f"{name}/convA.0.model.1.weight"])
        network = filled(ContentEncoder(ngf=ngf), recording, name)
        compare(recording, f"{name}_eval", [network(x, domain) for x, domain in zip(xs, "ab", strict=True)], xs)
    for name in recorded(recording, "E_attr", "E_attr_concat"):
        weights = list(recording.under(f"{name}/").values())
        ngf = next(len(weight) for weight in weights if weight.shape[1:2] == (3,))
        code = next(len(weight) for weight in weights if weight.shape[1:2] == (4 * ngf,) and len(weight) != 4 * ngf)
        network = filled(AttributeEncoder(ngf=ngf, code=code, concat=name == "E_attr_concat"), recording, name)
        found = [value for x, domain in zip(xs, "ab", strict=True) for value in network(x, domain) if value is not None]
        compare(recording, name, found, xs)


@each("drit_networks*.npz")
def test_generators(recording: Recording) -> None:
    content, code = recording["content"].requires_grad_(), recording["z"].requires_grad_()
    sizes = {"ngf": content.shape[1] // 4, "code": code.shape[1]}
    for case in recorded(recording, "G_a", "G_b", "G_concat_a", "G_concat_b"):
        name, _, domain = case.rpartition("_")
        network = (FeatureGenerator if name == "G" else ConcatGenerator)(**sizes)
        compare(recording, case, [filled(network, recording, name)(content, code, domain)], [content, code])


@each("drit_networks*.npz")
def test_discriminators(recording: Recording) -> None:
    x = recording["x_dis"].requires_grad_()
    ndf = len(recording["Dis/model.0.model.1.weight"])
    for name in recorded(recording, "MultiScaleDis", "Dis"):
        network = filled(DritDiscriminatorConfig(ndf=ndf, scales=1 if name == "Dis" else 3).build(), recording, name)
        # The one of a single scale gives its scores as a row.
        compare(recording, name, [score.flatten() if name == "Dis" else score for score in network(x)], [x])
    for name in recorded(recording, "Dis_content"):
        content = (recording[f"{name}_in_i8_over_8"].double() / 8).requires_grad_()
        score = filled(ContentDiscriminator(content.shape[1]), recording, name)(content).flatten()
        assert_same(score, recording[f"{name}_out0"], 1e-9)
        (gradient,) = torch.autograd.grad(weighted(score), content)
        assert_same(gradient[..., ::4, ::4], recording[f"{name}_grad_in0_s4"], 1e-9)


@each("drit_networks*.npz")
def test_spectral_norm(recording: Recording) -> None:
    x, name = recording["x_dis"].requires_grad_(), "MultiScaleDis_sn"
    weights = recording.under(f"{name}/")
    scales = len({key.split(".")[1] for key in weights})
    ndf = len(recording["Dis/model.0.model.1.weight"])
    network = MultiScaleDiscriminator(ndf=ndf, scales=scales, slope=SLOPE, spectral=True).double()
    fill_spectral(network, weights)
    compare(recording, name, network(x), [x])
    after = recording.under(f"{name}_after/").values()
    layers = [layer for layer in network.modules() if isinstance(layer, SpectralConv2d)]
    for layer, u in zip(layers, after, strict=True):
        assert_same(layer.u, u, 1e-9)


def fill_spectral(network: nn.Module, weights: dict[str, Tensor]) -> None:
    layers = [layer for layer in network.modules() if isinstance(layer, SpectralConv2d)]
    places = [key.removesuffix(".bias") for key in weights if key.endswith(".bias")]
    for layer, place in zip(layers, places, strict=True):
        given = {"weight": "weight_orig", "bias": "bias", "u": "weight_u"}
        layer.load_state_dict({ours: weights[f"{place}.{theirs}"] for ours, theirs in given.items()})


@each("drit_networks*.npz")
def test_adversarial_losses(recording: Recording) -> None:
    fakes, reals = (
        [recording[f"score_{kind}{n}"].requires_grad_() for n in range(len(recording.under(f"score_{kind}")))]
        for kind in ("fake", "real")
    )
    of_d = multi_scale_loss("vanilla", fakes, False) + multi_scale_loss("vanilla", reals, True)
    of_g = multi_scale_loss("vanilla", fakes, True)
    for name, loss, kinds in ("loss_D", of_d, {"fake": fakes, "real": reals}), ("loss_G_GAN", of_g, {"fake": fakes}):
        assert_same(loss, recording[name], 1e-9)
        for kind, scores in kinds.items():
            for number, gradient in enumerate(torch.autograd.grad(loss, scores, retain_graph=True)):
                assert_same(gradient, recording[f"{name}_grad_{kind}{number}"], 1e-9)
    score = recording["content_score"].requires_grad_()
    loss = confusion_loss(score)
    assert_same(loss, recording["loss_G_GAN_content"], 1e-9)
    assert_same(torch.autograd.grad(loss, score)[0], recording["loss_G_GAN_content_grad"], 1e-9)


# ---- training steps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordedDraws(Draws):
    """What the published code drew in step `number` of a recording."""

    recording: Recording = field(kw_only=True)
    number: int = field(kw_only=True)

    def stream(self, *name: int | str, device: Any = "cpu") -> Any:
        kind, *which, slot = name
        assert slot == 0
        again = "recon_" if which[-1] == "again" else ""
        key = {"noise": f"content_{again}{which[0]}", "attribute": f"eps_{again}{which[0]}",
               "code": {"1": "z", "2": "z2"}.get(str(which[0]))}[str(kind)]  # fmt: skip
        values = draws(self.recording, f"s{self.number}_draw_{key}")[0]
        return SimpleNamespace(normal=lambda *shape: values.permute(1, 2, 0) if kind == "noise" else values)


def method_of(recording: Recording, second: str) -> tuple[Drit, Any]:
    given = dict(word.partition("=")[::2] for word in str(recording.arrays["options"]).split())
    weights = {net: recording.under(f"init/{net}/") for net in NETWORKS}
    first = next(weight for weight in weights["enc_c"].values() if weight.shape[1:] == (3, 7, 7))
    scales = int(given.get("dis_scale", 3))
    spectral = any(key.endswith("weight_u") for key in weights["disA"])
    job = make_config({
        "method.name": "drit", "method.second": second, "method.every": 2,
        "method.mode_seeking": 0.0 if given.get("no_ms", "False") == "True" else 1.0,
        "method.generator.attributes": "concat" if given["concat"] == "1" else "feature-wise",
        "method.generator.ngf": len(first), "method.discriminator.scales": scales,
        "method.discriminator.spectral_norm": spectral,
        "method.discriminator.ndf": next(w for w in weights["disA"].values() if w.ndim == 4).shape[0],
        "optim.lr": float(given.get("lr", 1e-4)),
    })  # fmt: skip
    assert isinstance(job.method, DritConfig)
    method = job.method.build(seed=0, global_batch=2).double()
    for theirs, weight in weights.items():
        network = method.get_submodule(NETWORKS[theirs])
        (fill_spectral if any(key.endswith("weight_u") for key in weight) else fill)(network, weight)
    return method, job.optim


@each("drit_trace_*.npz")
@pytest.mark.parametrize("second", ["recomputed", "joint"])
def test_training_steps(recording: Recording, second: str) -> None:
    method, optim = method_of(recording, second)
    engine = make_engine(EngineConfig(kind="single", device="cpu", precision="fp32"))
    engine.prepare(method, optim)
    changes = {theirs: Changes(method.get_submodule(name)) for theirs, name in NETWORKS.items()}
    passes: list[Outputs] = []
    method.register_forward_hook(lambda _, given, outputs: passes.append(outputs))
    ops, met_full = recording.plain("ops"), False
    for number, operation in enumerate(ops):
        step = int(operation == "full")  # of every two steps, the second updates everything
        context = StepContext(RecordedDraws(0, step, recording=recording, number=number))
        batch = Pair(*(images(recording, key)[number] for key in ("real_A_u8", "real_B_u8")))
        passes.clear()
        losses = train_step(method, engine, [batch], context)
        recorded = recording.under(f"{second}/s{number}_")
        for name, value in recorded.items():
            if name.startswith("change/"):
                changes[name.removeprefix("change/")].check(value)
            else:
                assert (ours(name) or name) in losses, name
                assert_same(losses[ours(name) or name], value, 1e-9)
        if operation == "full" and not met_full:  # up to here the three variants are one
            compare_features(recording, number, passes[0], context.draws)
            met_full = True
    assert met_full


def compare_features(recording: Recording, number: int, made: Outputs, drawn: Draws) -> None:
    names = {"encoded": "other", "random": "drawn", "recon": "back"}
    for domain, translated in made.domains.items():
        assert_same(translated.content[..., ::12, ::12], recording[f"s{number}_z_content_{domain}"], 1e-9)
        attribute = translated.attribute
        assert attribute is not None
        z = attribute.mean
        if attribute.log_variance is not None:
            z = attribute.drawn(drawn.stream("attribute", domain, 0).normal(8))
        assert_same(z, recording[f"s{number}_z_attr_{domain}"], 1e-9)
        for theirs, name in names.items():
            picture = getattr(translated, name)
            picture = picture[0] if isinstance(picture, list) else picture
            assert_same(picture[..., ::12, ::12], recording[f"s{number}_fake_{domain.upper()}_{theirs}"], 1e-9)
        assert translated.same is not None
        letters = 2 * domain.upper()
        assert_same(translated.same[..., ::12, ::12], recording[f"s{number}_fake_{letters}_encoded"], 1e-9)


# ---- the beginning, and the schedule --------------------------------------------------------------------------------------


@each("drit_stats*.npz")
@pytest.mark.parametrize("setting", ["concat", "featurewise", "dis1"])
def test_initialisation(recording: Recording, setting: str) -> None:
    attributes = "feature-wise" if setting == "featurewise" else "concat"
    config = DritConfig(
        generator=DritGeneratorConfig(attributes=attributes),
        discriminator=DritDiscriminatorConfig(scales=1 if setting == "dis1" else 3),
    )
    method = config.build(seed=0, global_batch=2)
    for theirs, name in NETWORKS.items():
        count = sum(parameter.numel() for parameter in method.get_submodule(name).parameters())
        assert count == recording.plain(f"n_params_{setting}_{theirs}")
    if f"{setting}_names" not in recording:
        return
    places: dict[str, list[int]] = {}
    for place, name in enumerate(recording.plain(f"{setting}_names")):
        places.setdefault(re.split(r"[./]", name)[0], []).append(place)
    assert set(places) <= set(NETWORKS)
    for theirs, at in places.items():
        parameters = [p.detach() for p in method.get_submodule(NETWORKS[theirs]).parameters()]
        shapes = [recording.plain(f"{setting}_shapes")[place] for place in at]
        assert [p.numel() for p in parameters] == [int(np.prod([int(n) for n in s.split("x")])) for s in shapes]
        assert_drawn_alike(parameters, recording[f"{setting}_std"][at])
        for parameter, largest in zip(parameters, recording[f"{setting}_absmax"][at].tolist(), strict=True):
            if parameter.ndim == 1 and parameter.numel() > 100:  # biases are uniform, with a sharp end
                assert float(parameter.abs().max()) == pytest.approx(largest, rel=0.2)


@each("drit_stats*.npz")
def test_the_rate_falls_as_published_one_epoch_earlier(recording: Recording) -> None:
    for name, rates in recording.under("lr_").items():
        epochs, full = map(int, name.split("_"))
        factors = [lr_factor("linear", epoch, full, epochs - full) for epoch in range(1, epochs + 1)]
        assert_same(torch.tensor([1.0, *factors[:-1]], dtype=torch.float64), rates / rates[0])
