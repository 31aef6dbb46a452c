"""Replay of the published MUNIT in float64: its networks, losses, whole training steps and initialisation."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from launch.runs.config import make_config
from tests.trainer.parity.changes import Changes, assert_drawn_alike, draws, fill, images, weighted
from tests.trainer.parity.recorded import Recording, assert_same, each
from tests.trainer.parity.replay import Pair
from trainer.draws import Draws
from trainer.engines import EngineConfig, make_engine
from trainer.losses import multi_scale_loss
from trainer.methods.base import StepContext
from trainer.methods.munit import Encoded, Munit, MunitConfig
from trainer.networks.blocks import LayerNorm2d
from trainer.networks.multi_scale import MultiScaleDiscriminator
from trainer.networks.munit import AutoEncoder
from trainer.step import train_step

DOMAINS = {"gen_a": "autoencoder_a", "gen_b": "autoencoder_b", "dis_a": "discriminator_a", "dis_b": "discriminator_b"}
KINDS = {"lsgan": "lsgan", "nsgan": "vanilla"}  # theirs: ours


def convolutions_first(names: list[str]) -> list[str]:
    """The published layers have their norm before their convolution; ours come in the order of their use."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.partition(".norm.")[0].partition(".conv.")[0], []).append(name)
    return [name for layer in layers.values() for name in sorted(layer, key=lambda name: ".norm." in name)]


def ordered(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[name] for name in convolutions_first(list(weights))}


def sizes_of(weights: dict[str, Tensor]) -> dict[str, int]:
    """Of an auto-encoder, read from its weights."""
    style_layers = [value for key, value in weights.items() if key.startswith("enc_style") and value.ndim == 4]
    hidden = weights["mlp.model.0.fc.bias"]
    blocks = {key.split(".")[4] for key in weights if key.startswith("dec.model.0.model.")}
    return {"ngf": len(style_layers[0]), "style": len(style_layers[-1]), "hidden": len(hidden), "blocks": len(blocks)}


def scales_of(weights: dict[str, Tensor]) -> dict[str, Any]:
    return {"ndf": len(next(iter(weights.values()))), "scales": len({key.split(".")[1] for key in weights})}


@each("munit_networks*.npz")
def test_networks(recording: Recording) -> None:
    weights = recording.under("gen/")
    network = AutoEncoder(**sizes_of(weights)).double()
    fill(network, ordered(weights))
    for case in recording.before("_content"):
        x, style = recording[f"{case}_x"].requires_grad_(), recording[f"{case}_style_in"].requires_grad_()
        content, own_style = network.encode(x)
        assert_same(content, recording[f"{case}_content"], 1e-9)
        assert_same(own_style, recording[f"{case}_style"].flatten(1), 1e-9)
        out = network.decode(content, style.flatten(1))
        assert_same(out, recording[f"{case}_out"], 1e-9)
        of_x, of_style = torch.autograd.grad(weighted(out), [x, style])
        assert_same(of_x.float(), recording[f"{case}_grad_x"], 1e-6)
        assert_same(of_style, recording[f"{case}_grad_style_in"], 1e-9)
        if f"{case}_grad_x_of_sum_style_sq" in recording:
            (of_x,) = torch.autograd.grad(network.style_encoder(x).square().sum(), x)
            assert_same(of_x.float(), recording[f"{case}_grad_x_of_sum_style_sq"], 1e-6)


@each("munit_networks*.npz")
def test_discriminator_and_its_losses(recording: Recording) -> None:
    weights = recording.under("dis/")
    network = MultiScaleDiscriminator(**scales_of(weights)).double()
    fill(network, weights)
    fake = recording["dis_fake"].requires_grad_()
    scores = network(fake)
    for number, score in enumerate(scores):
        assert_same(score, recording[f"dis_out{number}"], 1e-9)
    assert f"dis_out{len(scores)}" not in recording
    for theirs, kind in KINDS.items():
        of_d = multi_scale_loss(kind, scores, False) + multi_scale_loss(kind, network(recording["dis_real"]), True)
        for name, loss in ("dis", of_d), ("gen", multi_scale_loss(kind, scores, True)):
            assert_same(loss, recording[f"{name}_loss_{theirs}"], 1e-9)
            if f"{name}_loss_{theirs}_grad_fake" in recording:
                (gradient,) = torch.autograd.grad(loss, fake, retain_graph=True)
                assert_same(gradient.float(), recording[f"{name}_loss_{theirs}_grad_fake"], 1e-6)


@each("munit_networks*.npz")
def test_layer_norm(recording: Recording) -> None:
    for case in recording.before("_gradw"):
        x = recording[f"{case}_x"].requires_grad_()
        norm = LayerNorm2d(x.shape[1], sample=True).double()
        fill(norm, {name: recording[f"{case}_{name}"] for name in ("gamma", "beta")})
        out = norm(x)
        assert_same(out, recording[f"{case}_out"], 1e-9)
        gradients = torch.autograd.grad((out * recording[f"{case}_gradw"]).sum(), [x, norm.gain, norm.shift])
        for name, gradient in zip(("x", "gamma", "beta"), gradients, strict=True):
            assert_same(gradient, recording[f"{case}_grad_{name}"], 1e-9)


@dataclass(frozen=True)
class RecordedDraws(Draws):
    """The styles that the published code drew in one step."""

    recording: Recording

    def stream(self, *name: int | str, device: Any = "cpu") -> Any:
        forward, domain, slot = name
        turn = {"shown": "dis", "translate": "gen"}[str(forward)]
        style = draws(self.recording, f"s{self.step}_draw_{turn}_s_{domain}")[int(slot)].flatten()
        return SimpleNamespace(normal=lambda length: style)


def method_of(recording: Recording) -> tuple[Munit, Any]:
    given = dict(pair.split("=") for pair in str(recording.arrays["options"]).split() if "=" in pair)
    read: dict[str, tuple[str, Callable[[str], Any]]] = {
        "recon_x_cyc_w": ("method.cycle", float), "gan_type": ("method.gan", KINDS.get),
        "gan_w": ("method.lambda_gan", float), "recon_x_w": ("method.image", float),
        "recon_s_w": ("method.style", float), "recon_c_w": ("method.content", float),
        "lr": ("optim.lr", float), "weight_decay": ("optim.weight_decay", float),
    }  # fmt: skip
    options: dict[str, Any] = {"method.name": "munit", "method.cycle": 0.0}
    options |= {read[name][0]: read[name][1](value) for name, value in given.items() if name in read}
    options |= {f"method.generator.{k}": v for k, v in sizes_of(recording.under("init/gen_a/")).items()}
    options |= {f"method.discriminator.{k}": v for k, v in scales_of(recording.under("init/dis_a/")).items()}
    job = make_config(options | {"optim.global_batch": recording["real_A_u8"].shape[1]})
    assert isinstance(job.method, MunitConfig)
    return job.method.build(seed=0, global_batch=job.optim.global_batch).double(), job.optim


@each("munit_trace_*.npz")
def test_training_steps(recording: Recording) -> None:
    method, optim = method_of(recording)
    for theirs, ours in DOMAINS.items():
        fill(method.get_submodule(ours), ordered(recording.under(f"init/{theirs}/")))
    engine = make_engine(EngineConfig(kind="single", device="cpu", precision="fp32"))
    engine.prepare(method, optim)
    changes = {theirs: Changes(method.get_submodule(ours)) for theirs, ours in DOMAINS.items()}
    norms: dict[str, Tensor] = {}
    members_of: dict[str, dict[str, tuple[str, ...]]] = {
        "discriminator": {"dis": ("dis_a", "dis_b")},
        "generator": {"gen_a": ("gen_a",), "gen_b": ("gen_b",)},
    }
    for phase, networks in members_of.items():

        def note(*_: Any, networks: dict[str, tuple[str, ...]] = networks) -> None:
            for name, members in networks.items():
                found = [p.grad for each in members for p in method.get_submodule(DOMAINS[each]).parameters()]
                norms[name] = torch.stack([torch.as_tensor(gradient).norm() for gradient in found]).norm()

        engine.optimisers[phase].register_step_pre_hook(note)

    made: list[dict[str, Encoded]] = []
    method.register_forward_hook(lambda _, given, outputs: made.append(outputs))
    sources, targets = images(recording, "real_A_u8"), images(recording, "real_B_u8")
    for step, (source, target) in enumerate(zip(sources, targets, strict=True)):
        context, batch = StepContext(RecordedDraws(0, step, recording)), Pair(source, target)
        engine.set_learning_rate(recording["lr"][step].item())
        losses = train_step(method, engine, [batch], context)
        compare_losses(recording, step, losses)
        compare_features(recording, step, made[-1])
        for name, norm in recording.under(f"s{step}_gradnorm_").items():
            assert_same(norms[name], norm, 1e-9)
        for theirs, change in changes.items():
            names = recording.plain(f"params/{theirs}")
            change.check(
                recording[f"s{step}_change/{theirs}"][[names.index(name) for name in convolutions_first(names)]]
            )


def compare_losses(recording: Recording, step: int, losses: dict[str, Tensor]) -> None:
    names = {"dis": "D", "gen_recon_x": "image", "gen_recon_s": "style", "gen_recon_c": "content", "gen_adv": "G",
             "gen_cycrecon_x": "cycle"}  # fmt: skip
    recorded = recording.under(f"s{step}_loss_")
    assert_same(losses["G"], recorded.pop("gen_total"), 1e-9)
    assert_same(losses["D_A"] + losses["D_B"], recorded.pop("dis_total"), 1e-9)
    for name, value in recorded.items():
        kind, _, domain = name.rpartition("_")
        if kind in names:
            ours = losses.get(f"{names[kind]}_{domain.upper()}")
            assert_same(torch.zeros(()).double() if ours is None else ours, value.double(), 1e-9)
        else:
            assert value == 0, name  # the perceptual loss, which is left out


def compare_features(recording: Recording, step: int, made: dict[str, Encoded]) -> None:
    a, b = made["a"], made["b"]
    # "ba": what auto-encoder a finds in the translation of b; its content is b's.
    encoded = {"a": (a.content, a.style), "b": (b.content, b.style),
               "ba": (b.content_again, a.style_again), "ab": (a.content_again, b.style_again)}  # fmt: skip
    for name, (content, style) in encoded.items():
        assert_same(content[..., ::4, ::4], recording[f"s{step}_enc_{name}_content_s4"], 1e-9)
        assert_same(style, recording[f"s{step}_enc_{name}_style"].flatten(1), 1e-9)
    pictures = {
        "recon_a": a.same,
        "recon_b": b.same,
        "x_ba": a.other,
        "x_ab": b.other,
        "x_aba": a.back,
        "x_bab": b.back,
    }
    for name, picture in pictures.items():
        if picture is not None and f"s{step}_{name}_s4" in recording:
            assert_same(picture[..., ::4, ::4], recording[f"s{step}_{name}_s4"], 1e-9)


@each("munit_stats*.npz")
def test_initialisation(recording: Recording) -> None:
    method = MunitConfig().build(seed=0, global_batch=1)
    for theirs, ours in DOMAINS.items():
        count = sum(parameter.numel() for parameter in method.get_submodule(ours).parameters())
        assert count == recording.plain(f"n_params_{theirs}")
    shapes = [tuple(map(int, shape.split("x"))) for shape in recording.plain("shapes")]
    names = recording.plain("names")
    places = [names.index(name) for name in convolutions_first(names)]
    parameters = [
        p.detach() for name in ("autoencoder_a", "discriminator_a") for p in method.get_submodule(name).parameters()
    ]
    assert [tuple(parameter.shape) for parameter in parameters] == [shapes[place] for place in places]
    assert_drawn_alike(parameters, recording["std"][places])
    gains = [p for place, p in zip(places, parameters, strict=True) if names[place].endswith("gamma")]
    assert gains and all(gain.min() >= 0 and gain.max() < 1 and abs(gain.mean() - 0.5) < 0.2 for gain in gains)
