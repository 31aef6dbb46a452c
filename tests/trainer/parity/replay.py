"""A recorded training of CUT, FastCUT or SRUNIT, step by step, by this project's engine, optimiser and order of the step.

Everything that varies is read from the recording: options, sizes of the networks, batch, steps, starting point, draws.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from launch.runs.config import JobConfig, make_config
from tests.trainer.parity.recorded import Recording, assert_same
from trainer.draws import Draws
from trainer.engines import EngineConfig, make_engine
from trainer.methods import Cut, CutConfig
from trainer.methods.base import StepContext
from trainer.methods.parts.contrast import PAPER_TAPS
from trainer.networks.norm import InstanceNorm2d
from trainer.step import train_step


@dataclass(frozen=True)
class RecordedDraws(Draws):
    """The draws that the published code made in one training step, in place of our own."""

    recording: Recording
    taps: tuple[int, ...]

    def recorded(self, name: str) -> Tensor:
        return self.recording[f"s{self.step}_{name}"]

    def stream(self, *name: int | str, device: Any = "cpu") -> Any:
        match name:
            case (str(stream), "ids", int(tap)):
                taps = len(self.taps)
                first = {"nce": 0, "identity": taps, "robust": 2 * taps}[stream]  # drawn one after the other
                ids = self.recorded(f"ids{first if stream == 'robust' else first + self.taps.index(tap)}")
                return SimpleNamespace(permutation=lambda positions, count: ids)
            case ("flip", "coin"):
                return SimpleNamespace(coin=lambda: bool(self.recorded("flipdraw0") < 0.5))
            case ("robust", "choice"):
                return SimpleNamespace(integers=lambda high: self.recorded("choice0"))
            case ("tau", _, int(slot)):
                draws = {kind: self.recorded(f"{kind}0")[slot] for kind in ("normal", "uniform")}
                return SimpleNamespace(
                    normal=lambda *shape, dtype: draws["normal"], uniform=lambda *shape, dtype: draws["uniform"]
                )
        raise AssertionError(f"the published code draws no {name}")


@dataclass(frozen=True)
class Pair:
    source: Tensor
    target: Tensor

    @property
    def slots(self) -> Tensor:
        return torch.arange(len(self.source))


def start_of(recording: Recording) -> dict[str, dict[str, Tensor]]:
    """The weights before the first step by network, G, D and F: the file's own, or those that all files of a folder share."""
    own = any(key.startswith("init/") for key in recording.keys)
    return {
        letter: recording.under(f"init/{letter}/") if own else recording.beside("trace_init").under(f"{letter}/")
        for letter in "GDF"
    }


def command_line(recording: Recording) -> dict[str, str]:
    """The published code's options, without the dashes; a switch is "true"."""
    words = str(recording.arrays["options"]).split()
    values = [*words[1:], "--"]
    pairs = zip(words, values, strict=True)
    return {w.removeprefix("--"): "true" if v.startswith("--") else v for w, v in pairs if w.startswith("--")}


def job_of(recording: Recording) -> JobConfig:
    """The recorded training as a job of ours."""
    given, start = command_line(recording), start_of(recording)
    model = {"srunit": "srunit-released"}.get(given["model"], given["model"])
    name = "fastcut" if given.get("CUT_mode", "CUT").lower() == "fastcut" else model
    taps = tuple(int(tap) for tap in given["nce_layers"].split(",")) if "nce_layers" in given else PAPER_TAPS
    blocks = {key.split(".")[1] for key in start["G"] if "conv_block" in key}
    antialias = {letter: any(key.endswith("filt") for key in start[letter]) for letter in "GD"}
    options: dict[str, Any] = {
        "method.name": name, "method.taps": taps,
        "method.patches": max(len(ids) for key, ids in recording.under("s0_").items() if key.startswith("ids")),
        "method.generator.ngf": len(start["G"]["model.1.weight"]), "method.generator.blocks": len(blocks),
        "method.generator.antialias": antialias["G"], "method.discriminator.ndf": len(start["D"]["model.0.weight"]),
        "method.discriminator.antialias": antialias["D"], "method.head_dim": len(start["F"]["mlp_0.0.weight"]),
        "optim.lr": recording.plain("lr"), "optim.global_batch": recording["real_A"].shape[1],
        "optim.beta1": recording.plain("betas")[0], "optim.beta2": recording.plain("betas")[1],
    }  # fmt: skip
    if name == "srunit-released":
        options |= {
            "method.robust.start": 0.0, "method.robust.gradient": "generator" if given.get("reg_type") == "v1" else "both"
        }  # fmt: skip
    published: dict[str, tuple[str, Callable[[str], Any]]] = {
        "nce_includes_all_negatives_from_minibatch": ("method.all_negatives", is_true),
        "reg": ("method.robust.beta", float), "reg_noise": ("method.robust.T", float),
        "nce_idt": ("method.identity", is_true), "flip_equivariance": ("method.flip_equivariance", is_true),
        "gan_mode": ("method.gan", str), "nce_T": ("method.temperature", float),
        "lambda_GAN": ("method.lambda_gan", float), "lambda_NCE": ("method.lambda_nce", float),
    }  # fmt: skip
    options |= {ours: read(given[theirs]) for theirs, (ours, read) in published.items() if theirs in given}
    return make_config(options)


def is_true(word: str) -> bool:
    return word.lower() in ("true", "1", "yes")


def replay(recording: Recording, memory_format: str, change: Callable[[Cut], None] = lambda method: None) -> None:
    """Train as recorded, with a method that is changed first, and compare each step's losses, translation and gradients and
    the weights at the end."""
    job = job_of(recording)
    sources, targets = recording["real_A"], recording["real_B"]
    engine = make_engine(EngineConfig(kind="single", device="cpu", precision="fp32", memory_format=memory_format))
    assert isinstance(job.method, CutConfig)
    method = job.method.build(seed=0, global_batch=job.optim.global_batch).double()
    change(method)
    networks = {"G": method.generator, "D": method.discriminator, "F": method.heads}
    for letter, weights in start_of(recording).items():
        networks[letter].load_state_dict(weights)
    engine.prepare(method, job.optim)
    # As the optimisers find them: Adam's steps alone would look the same with a loss of twice the size.
    gradients: dict[str, list[Tensor]] = {}
    for phase, letters in ("discriminator", "D"), ("generator", "GF"):

        def note(*_: Any, letters: str = letters) -> None:
            for letter in letters:
                gradients[letter] = [torch.as_tensor(p.grad).norm() for p in networks[letter].parameters()]

        engine.optimisers[phase].register_step_pre_hook(note)

    for step, (source, target) in enumerate(zip(sources, targets, strict=True)):
        context = StepContext(RecordedDraws(0, step, recording, job.method.taps))
        with torch.no_grad():
            fake = method(Pair(source, target), context).fake
        assert_same(fake, recording[f"s{step}_fake_B"], 1e-9)
        losses = train_step(method, engine, [Pair(source, target)], context)
        recorded = recording.under(f"s{step}_loss_")
        if not any(part.name == "robust" for part in method.parts):
            recorded.pop("reg", None)
        for name, value in recorded.items():
            assert_same(losses["robust" if name == "reg" else name], value, 1e-9)
        for letter, norms in recording.under(f"s{step}_gradnorms_").items():
            assert_same(torch.stack(gradients[letter]), norms, 1e-8)

    for letter, network in networks.items():
        without_effect = biases_before_a_norm(network)
        for name, value in recording.under(f"final/{letter}/").items():
            # The norm takes such a bias away again. Its gradient is rounding, from which Adam makes steps of up to lr / 500.
            tolerance = job.optim.lr / 100 if name in without_effect else 1e-9
            torch.testing.assert_close(network.state_dict()[name], value, rtol=0, atol=tolerance)


def biases_before_a_norm(network: nn.Module) -> set[str]:
    """Names of the biases whose true gradient is 0."""
    return {
        f"{name}.{index}.bias"
        for name, layers in network.named_modules()
        if isinstance(layers, nn.Sequential)
        for index, follower in enumerate(list(layers)[1:])
        if isinstance(follower, InstanceNorm2d)
    }
