"""A recorded training of CycleGAN or of a method that took over its networks (GcGAN, DistanceGAN), step by step, by this
project's engine, optimisers and order of the step. Everything that varies is read from the recording."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from launch.runs.config import JobConfig, make_config
from tests.trainer.parity.recorded import Recording, assert_same
from tests.trainer.parity.replay import Pair, command_line
from trainer.draws import Draws
from trainer.engines import EngineConfig, make_engine
from trainer.methods.base import Method, StepContext
from trainer.methods.parts.adversary import Adversary
from trainer.methods.parts.image_buffers import ImageBuffers
from trainer.networks.norm import InstanceNorm2d
from trainer.step import train_step

CLASSES = {"Pad2d": "ReflectionPad2d", "ResnetBlock": "ResnetBlock"}  # ours: published


@dataclass(frozen=True)
class PoolDraws(Draws):
    """The draws of the published image pools in one step. pools: their names by those of our buffers."""

    recording: Recording
    pools: Mapping[str, str]

    def stream(self, *name: int | str, device: Any = "cpu") -> Any:
        buffer, slot = name
        of_pool = f"s{self.step}_pool_{self.pools[str(buffer)]}"
        uniform, index = (self.recording.plain(f"{of_pool}_{kind}")[slot] for kind in ("uniform", "randint"))
        return SimpleNamespace(uniform=lambda: uniform, integers=lambda high: index)


class OnePool(ImageBuffers):
    """The published pool, which all images of a batch go through, one after the other. Ours has a buffer for each slot."""

    def __init__(self, buffers: ImageBuffers, images: int) -> None:
        super().__init__(buffers.name, images, 1)

    def show(self, images: Tensor, slots: Tensor, draws: Draws) -> Tensor:
        if not self.capacity:
            return images.detach()
        seen = []
        for image, stream in zip(images, draws.per_slot(slots, self.name), strict=True):
            uniform, place = (torch.tensor([draw]) for draw in (stream.uniform(), stream.integers(self.capacity)))
            seen.append(self.exchange(image[None], torch.tensor([0]), uniform, place))
        return torch.cat(seen, out=torch.empty_like(images.detach()))


@dataclass(frozen=True)
class Published:
    """How the names of a recording go with ours.

    networks: by their published names. adversaries: by the published names of the pools that are theirs.
    outputs: the pictures of a step by their published names, of those that the forward pass gives and the batch.
    losses: our names of losses by their published ones, where they are others.
    """

    networks: Mapping[str, nn.Module]
    adversaries: Mapping[str, Adversary]
    outputs: Callable[[Any, Pair], Mapping[str, Tensor | None]]
    losses: Mapping[str, str] = field(default_factory=dict)


def job_of(
    recording: Recording,
    name: str,
    read: Mapping[str, Callable[[str], dict[str, Any]]],
    defaults: Mapping[str, Any] | None = None,
) -> JobConfig:
    """The recorded training as a job of ours. read: our options by the published one that they come from. defaults: of the
    published code, where ours are others."""
    given = command_line(recording)
    of_kind = {network[0]: network for network in recording.plain("networks")}
    blocks = {key.split(".")[1] for key in recording.plain(f"keys/{of_kind['G']}") if "conv_block" in key}
    layers = [weight for weight in recording.under(f"init/{of_kind['D']}/").values() if weight.ndim == 4]
    options: dict[str, Any] = {
        **(defaults or {}),
        "method.name": name, "method.generator.blocks": len(blocks), "method.generator.ngf": recording.plain("ngf"),
        "method.discriminator.layers": len(layers) - 2, "method.discriminator.ndf": recording.plain("ndf"),
        "optim.lr": recording.plain("lr"), "optim.global_batch": recording["real_A"].shape[1],
        "optim.beta1": recording.plain("betas")[0], "optim.beta2": recording.plain("betas")[1],
    }  # fmt: skip
    shared: dict[str, Callable[[str], dict[str, Any]]] = {
        "pool_size": lambda text: {"method.buffer": int(text)},
        "gan_mode": lambda text: {"method.gan": text},
        "no_lsgan": lambda text: {"method.gan": "vanilla"},
    }
    for option, value in given.items():
        if option in {**shared, **read}:
            options |= {**shared, **read}[option](value)
    return make_config(options)


def replay(
    recording: Recording,
    job: JobConfig,
    names: Callable[[Any], Published],
    memory_format: str,
    change: Callable[[Any], None] = lambda method: None,
) -> None:
    """Train as recorded, with a method that is changed first, and compare each step's losses, pictures and gradients, the
    weights at the end, and what they make of a test image."""
    engine = make_engine(EngineConfig(kind="single", device="cpu", precision="fp32", memory_format=memory_format))
    method: Method[Any, Any] = job.method.build(seed=0, global_batch=job.optim.global_batch).double()
    change(method)
    published = names(method)
    pools = {}
    for pool, adversary in published.adversaries.items():
        adversary.buffers = OnePool(adversary.buffers, job.method.buffer)  # type: ignore[attr-defined]
        pools[adversary.buffers.name] = pool
    for name, network in published.networks.items():
        assert list(network.state_dict()) == recording.plain(f"keys/{name}")
        assert [key for key, _ in network.named_parameters()] == recording.plain(f"param_keys/{name}")
        if f"module_names/{name[0]}" in recording:
            assert class_names(network) == recording.plain(f"module_names/{name[0]}")[: len(class_names(network))]
        network.load_state_dict(recording.under(f"init/{name}/"))
    engine.prepare(method, job.optim)
    gradients: dict[str, Tensor] = {}

    def note(kind: str, *_: Any) -> None:
        for name, network in published.networks.items():
            if name.startswith(kind):
                found = [p.grad.norm() if p.grad is not None else torch.zeros(()) for p in network.parameters()]
                gradients[name] = torch.stack([norm.double() for norm in found])

    for optimiser in ("generator", "discriminator"):
        engine.optimisers[optimiser].register_step_pre_hook(partial(note, optimiser[0].upper()))
    for step, images in enumerate(zip(recording["real_A"], recording["real_B"], strict=True)):
        batch = Pair(*images)
        context = StepContext(PoolDraws(0, step, recording, pools))
        with torch.no_grad():
            pictures = published.outputs(method(batch, context), batch)
        for name, picture in pictures.items():
            if picture is not None and f"s{step}_{name}" in recording:
                torch.testing.assert_close(picture, recording[f"s{step}_{name}"], rtol=0, atol=1e-9)
        losses = train_step(method, engine, [batch], context)
        for name, value in recording.under(f"s{step}_loss_").items():
            ours = losses.get(published.losses.get(name, name), torch.zeros((), dtype=torch.float64))
            assert_same(ours, value, 1e-9)  # what is not asked for is 0 there
        for name, norms in recording.under(f"s{step}_gradnorms_").items():
            assert_same(gradients[name], norms, 1e-9)
    for name, network in published.networks.items():
        for key, value in recording.under(f"final/{name}/").items():
            torch.testing.assert_close(network.state_dict()[key], value, rtol=0, atol=1e-7)
    if "test_A" in recording:
        assert isinstance(method.product, nn.Module)
        with torch.no_grad():
            for direction, name in ("AtoB", "test_fake_B"), ("BtoA", "test_fake_A"):
                if name in recording:
                    translated = method.product(recording["test_A"], None, direction)
                    torch.testing.assert_close(translated, recording[name], rtol=0, atol=1e-6)


def class_names(network: Any) -> list[str]:
    """Of the layers, as the recordings have them: "index:class"."""
    names: list[str] = []
    for before, layer in zip([None, *network.model], network.model, strict=False):
        name = type(layer).__name__
        if isinstance(layer, nn.Identity):  # the activation, which the norm before it computes
            assert isinstance(before, InstanceNorm2d)
            name = {0.0: "ReLU", 0.2: "LeakyReLU"}[before.slope]
        names.append(CLASSES.get(name, name))
    return [f"{index}:{name}" for index, name in enumerate(names)]


def assert_same_initialisation(recording: Recording, networks: Mapping[str, nn.Module]) -> None:
    """networks: at full size, by their published names."""
    for network, count in zip(recording.plain("networks"), recording.plain("n_params"), strict=True):
        module = networks[network]
        assert sum(parameter.numel() for parameter in module.parameters()) == count
        columns = (recording.plain(f"{network}_{kind}") for kind in ("names", "std", "mean", "absmax"))
        for name, spread, mean, largest in zip(*columns, strict=True):
            parameter = module.get_parameter(name).detach()
            # Estimates from n draws each, of a relative standard error of at most 1 / sqrt(2 n).
            error = 5 * 2**0.5 / (2 * parameter.numel()) ** 0.5
            if largest == 0:
                assert not parameter.any(), name
            elif parameter.numel() > 1:
                assert parameter.std(correction=0) == pytest.approx(spread, rel=error), name
                assert abs(float(parameter.mean()) - mean) < 10 * spread / parameter.numel() ** 0.5, name
            if parameter.ndim == 1 and largest and mean < 0.5:  # a uniform bias, whose bound is as good as reached
                assert float(parameter.abs().max()) <= largest * (1 + 10 / np.sqrt(parameter.numel())), name
