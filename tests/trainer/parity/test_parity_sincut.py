"""Replay of the published SinCUT: its networks, and whole training steps, in float64."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch.runs.config import JobConfig, make_config
from tests.trainer.parity.recorded import Recording, assert_same, each
from tests.trainer.parity.replay import Pair, RecordedDraws, command_line
from trainer.engines import EngineConfig, make_engine
from trainer.losses import gradient_norms
from trainer.methods.base import StepContext
from trainer.methods.sincut import Sincut, SincutConfig, SincutTranslation
from trainer.networks.published import load_published, shaped_alike
from trainer.networks.stylegan2 import StyleDiscriminator, StyleGenerator
from trainer.step import train_step


def loaded(network: nn.Module, recording: Recording, prefix: str = "sd/") -> Any:
    """Read from a file, as the published code leaves one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pth"
        torch.save(recording.under(prefix), path)
        load_published(network.double(), path)
    return network


def gradients_of(network: nn.Module, names: list[str]) -> Tensor:
    found = [network.get_parameter(name).grad for name in names]
    return torch.stack([torch.zeros((), dtype=torch.float64) if grad is None else grad.norm() for grad in found])


@each("sincut_generator*.npz")
def test_generator(recording: Recording) -> None:
    network = loaded(StyleGenerator(recording.plain("ngf"), size=recording.plain("crop_size")), recording)
    assert list(network.state_dict()) == recording.plain("keys")
    for tag in recording.before("_x"):
        if tag.endswith("grad"):
            continue
        x = recording[f"{tag}_x"].requires_grad_()
        taps = [int(key) for key in recording.under(f"{tag}_feat")]
        out, features = network.forward_with_features(x, taps, recording[f"{tag}_noise0"])
        assert_same(out, recording[f"{tag}_out"], 1e-9)
        for tap, feature in zip(taps, features, strict=True):
            assert_same(feature, recording[f"{tag}_feat{tap}"], 1e-9)
        if taps:
            assert_same(network.encode(x, taps)[-1], features[-1].detach())
        network.zero_grad()
        (out * recording[f"{tag}_gradw"]).sum().backward()
        assert x.grad is not None
        assert_same(x.grad, recording[f"{tag}_grad_x"], 1e-9)
        assert_same(gradients_of(network, recording.plain("param_keys")), recording[f"{tag}_grad_norms"], 1e-9)


@each("sincut_discriminator*.npz")
def test_discriminator_its_tiles_and_the_penalty_on_its_slope(recording: Recording) -> None:
    network = loaded(StyleDiscriminator(recording.plain("ndf"), recording.plain("crop_size")), recording)
    assert list(network.state_dict()) == recording.plain("keys")
    names, x = recording.plain("param_keys"), recording["x"].requires_grad_()
    out = network(x)
    assert_same(out, recording["out"], 1e-9)
    (out * recording["gradw"]).sum().backward()
    if "grad_x" in recording:
        assert x.grad is not None
        assert_same(x.grad, recording["grad_x"], 1e-9)
    assert_same(gradients_of(network, names), recording["grad_norms"], 1e-9)
    assert_same(network(recording["tiles_x"]), recording["tiles_out"], 1e-9)

    network.zero_grad()
    r1 = gradient_norms(network, x).square().mean() / 2 * recording.plain("lambda_R1")
    assert_same(r1, recording["r1"], 1e-9)
    r1.backward()
    assert_same(gradients_of(network, names), recording["r1_grad_norms"], 1e-9)
    for name in (recording.plain("r1_grad_first_name"), "convs.1.conv1.1.bias"):
        key = "r1_grad_first" if name == recording.plain("r1_grad_first_name") else f"r1_grad_{name}"
        gradient = torch.as_tensor(network.get_parameter(name).grad)
        assert_same(gradient, recording[key].reshape(gradient.shape), 1e-9)


@each("sincut_init_stats*.npz")
def test_initialisation(recording: Recording) -> None:
    """At the published sizes."""
    job = make_config({"method.name": "sincut"})
    method = job.method.build(seed=0, global_batch=16)
    networks: dict[str, Any] = {"G": method.generator, "D": method.discriminator, "F": method.heads}
    counts = [sum(p.numel() for p in networks[name].parameters()) for name in recording.plain("networks")]
    assert counts == recording.plain("n_params")
    for letter, network in networks.items():
        table = zip(*(recording.arrays[f"{letter}_{key}"] for key in ("names", "shapes", "std", "absmax")), strict=True)
        for name, shape, spread, largest in table:
            parameter = network.get_parameter(str(name)).detach()
            assert [side for side in parameter.shape if side > 1] == [
                int(n) for n in re.findall(r"\d+", shape) if n != "1"
            ]
            if largest == 0:
                assert not parameter.any()
            else:  # both are estimates from n draws, with a relative standard error of 1 / sqrt(2 n) each
                error = 5 * 2**0.5 / (2 * parameter.numel()) ** 0.5
                assert parameter.std(correction=0) == pytest.approx(spread, rel=error)


@dataclass(frozen=True)
class SincutDraws(RecordedDraws):
    def stream(self, *name: int | str, device: Any = "cpu") -> Any:
        match name:
            case ("noise", str(domain), int(slot)):
                noise = self.recorded("noise0")
                row = slot + (len(noise) // 2 if domain == "target" else 0)
                return SimpleNamespace(normal=lambda *shape, dtype: noise[row])
        return super().stream(*name, device=device)


def job_of(recording: Recording) -> JobConfig:
    """The recorded training as a job of ours; what the recording does not say has our defaults."""
    given = command_line(recording)
    published = {"lambda_R1": "lambda_r1", "lambda_identity": "lambda_idt", "lambda_NCE": "lambda_nce"}
    options: dict[str, Any] = {
        "method.name": given["model"], "data.crop": int(given["crop_size"]),
        "method.generator.size": int(given["crop_size"]), "method.discriminator.size": int(given["crop_size"]),
        "method.generator.ngf": recording.plain("ngf"), "method.discriminator.ndf": recording.plain("ndf"),
        "method.head_dim": int(given["netF_nc"]), "method.patches": len(recording["s0_ids0"]),
        "optim.lr": recording.plain("lr"), "optim.global_batch": int(given["batch_size"]),
        "optim.beta1": recording.plain("betas")[0], "optim.beta2": recording.plain("betas")[1],
    }  # fmt: skip
    return make_config(
        options | {f"method.{ours}": float(given[key]) for key, ours in published.items() if key in given}
    )


@each("sincut_trace_*.npz")
def test_training_steps(recording: Recording) -> None:
    job = job_of(recording)
    config = job.method
    assert isinstance(config, SincutConfig)
    engine = make_engine(EngineConfig(kind="single", device="cpu", precision="fp32"))
    method: Sincut = config.build(seed=0, global_batch=job.optim.global_batch).double()
    networks: dict[str, nn.Module] = {"G": method.generator, "D": method.discriminator, "F": method.heads}
    start = {letter: loaded(network, recording, f"init/{letter}/") for letter, network in networks.items()}
    before = {letter: {k: v.clone() for k, v in network.state_dict().items()} for letter, network in start.items()}
    engine.prepare(method, job.optim)
    gradients: dict[str, Tensor] = {}
    for phase, letters in ("discriminator", "D"), ("generator", "GF"):

        def note(*_: Any, letters: str = letters) -> None:
            for letter in letters:
                gradients[letter] = gradients_of(networks[letter], recording.plain(f"param_keys/{letter}"))

        engine.optimisers[phase].register_step_pre_hook(note)

    for step, images in enumerate(zip(recording["real_A"], recording["real_B"], strict=True)):
        pair = Pair(*images)
        context = StepContext(SincutDraws(0, step, recording, config.taps))
        if f"s{step}_fake_B" in recording:
            with torch.no_grad():
                assert_same(method(pair, context).fake, recording[f"s{step}_fake_B"], 1e-9)
        losses = train_step(method, engine, [pair], context)
        losses["D_R1"] *= config.lambda_r1
        losses["idt"] *= config.lambda_idt
        losses["G"] += losses["idt"]  # reported apart, like every loss that is added to CUT's
        for name, value in recording.under(f"s{step}_loss_").items():
            assert_same(losses[name], value, 1e-9)
        for letter, norms in recording.under(f"s{step}_gradnorms_").items():
            assert_same(gradients[letter], norms, 1e-9)

    for letter, network in networks.items():
        for name, value in shaped_alike(recording.under(f"final/{letter}/"), network.state_dict()).items():
            torch.testing.assert_close(network.state_dict()[name], value, rtol=0, atol=1e-7)
        for name, value in recording.under(f"changenorm/{letter}/").items():
            assert_same((network.state_dict()[name] - before[letter][name]).norm(), value, 1e-7)
    if "test_A" in recording:
        with torch.no_grad():
            translated = method.generator(recording["test_A"], recording["test_noise0"])
            ours = SincutTranslation(method.generator)(recording["test_A"], recording["test_noise0"])
        assert_same(translated, recording["test_fake_B"], 1e-9)
        assert torch.equal(ours, translated.clamp(-1, 1))
