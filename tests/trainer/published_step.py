"""The step in the shape of the published code, from stock modules: what the speed of ours is compared with.

One image of each domain, fp32, contiguous, eager. The generator runs once on both images; the features of the
contrastive loss are encoded anew from each original and each translation, all with graphs; L_robust is a loop over the
taps with two passes each. The losses, the draws and the projection heads are the project's own, and the networks
have the same parameters by name, so the baseline reports the same losses as `trainer.step.train_step`.

    python -m tests.trainer.published_step [--repetitions N] [--json FILE] [options of launch/train.py]

prints seconds of this step and of the one that launch/bench.py measures, in turn, and their ratio.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.config import flatten
from launch.benchmarks.measuring import Measurement, interleaved, ratios, table, write_report
from launch.benchmarks.step import WARM_UP, Training
from launch.runs.config import JobConfig, parse_arguments
from trainer.losses import adversarial_loss, patch_nce, perturbation, robustness_loss
from trainer.methods import Srunit
from trainer.methods.base import Batch, Losses, StepContext
from trainer.methods.parts.part import patch_ids
from trainer.methods.parts.robustness import noise
from trainer.optim import OptimConfig


class Blur(nn.Module):
    """[1, 2, 1] after reflection padding, every second pixel: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("filt", (torch.outer(row, row) / 16).repeat(channels, 1, 1, 1))
        self.pad = nn.ReflectionPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.pad(x), self.filt, stride=2, groups=x.shape[1])


class Upsample(nn.Module):
    """Zeros in between, replication padding, [1, 3, 3, 1] of gain 4: (B, C, H, W) -> (B, C, 2H, 2W)."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("filt", (torch.outer(row, row) / 16).repeat(channels, 1, 1, 1))
        self.pad = nn.ReplicationPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(self.pad(x), self.filt, stride=2, padding=3, groups=x.shape[1])


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels), nn.ReLU(True),
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


def generator(ngf: int, blocks: int) -> nn.Sequential:
    """The anti-aliased ResNet generator of CUT: (B, 3, H, W) to the same shape."""

    def normed(convolution: nn.Conv2d) -> list[nn.Module]:
        return [convolution, nn.InstanceNorm2d(convolution.out_channels), nn.ReLU(True)]

    layers: list[nn.Module] = [nn.ReflectionPad2d(3), *normed(nn.Conv2d(3, ngf, 7))]
    for width in (2 * ngf, 4 * ngf):
        layers += [*normed(nn.Conv2d(width // 2, width, 3, padding=1)), Blur(width)]
    layers += [Block(4 * ngf) for _ in range(blocks)]
    for width in (2 * ngf, ngf):
        layers += [Upsample(2 * width), *normed(nn.Conv2d(2 * width, width, 3, padding=1))]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh())


def discriminator(ndf: int, layers: int) -> nn.Sequential:
    """The anti-aliased PatchGAN of CUT: (B, 3, H, W) -> (B, 1, H//8 - 2, W//8 - 2) for three layers."""
    widths = [ndf * min(2**n, 8) for n in range(layers + 1)]
    model: list[nn.Module] = []
    for n, width in enumerate(widths):
        model += [nn.Conv2d(widths[n - 1] if n else 3, width, 4, padding=1)]
        model += [nn.InstanceNorm2d(width)] if n else []
        model += [nn.LeakyReLU(0.2, True)]
        model += [Blur(width)] if n < layers else []
    return nn.Sequential(*model, nn.Conv2d(widths[-1], 1, 4, padding=1))


class PublishedStep:
    """One optimisation step of CUT or SRUNIT after another, with three Adams.

    cut: gives the options and the initial weights, which are copied. Its method is the published one: identity
    PatchNCE, no image buffer, no flip, no bank, negatives of the same image.
    """

    def __init__(self, cut: Srunit, optim: OptimConfig, device: torch.device) -> None:
        self.config, self.device = cut.config, device
        g, d = self.config.generator, self.config.discriminator
        self.generator = generator(g.ngf, g.blocks).to(device)
        self.discriminator = discriminator(d.ndf, d.layers).to(device)
        self.generator.load_state_dict(cut.generator.model.state_dict())
        self.discriminator.load_state_dict(cut.discriminator.model.state_dict())
        self.heads = cut.heads.to(device)
        self.optimisers = {
            name: torch.optim.Adam(network.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2))
            for name, network in (("D", self.discriminator), ("G", self.generator), ("F", self.heads))
        }

    def __call__(self, batch: Batch, context: StepContext) -> Losses:
        """batch: (b, 3, h, w) each; the published code has b = 1. Returns the named losses, as `train_step` does.

        For one image on a CPU the gradients are wrong where torch's instance norm is (`trainer.networks.norm`).
        """
        pairs = len(batch.source)
        fake, identity = self.generator(torch.cat([batch.source, batch.target])).split(pairs)
        d_fake = self._gan(fake.detach(), False)
        d_real = self._gan(batch.target, True)
        self._update((d_fake + d_real) / 2, "D")

        self.discriminator.requires_grad_(False)
        g_gan = self._gan(fake, True) * self.config.lambda_gan
        clean = self._encode(batch.source)
        nce = self._nce(self._encode(fake), clean, "nce", pairs, context)
        nce_identity = self._nce(self._encode(identity), self._encode(batch.target), "identity", pairs, context)
        total = g_gan + (nce + nce_identity) / 2
        named = {"D_fake": d_fake, "D_real": d_real, "G_GAN": g_gan, "G": total, "NCE": nce, "NCE_Y": nce_identity}
        if self.config.robust.beta > 0:
            named["robust"] = self._robustness(clean, batch, context)
            total = total + self.config.robust.beta * named["robust"]
        self._update(total, "G", "F")
        self.discriminator.requires_grad_(True)
        return {name: loss.detach() for name, loss in named.items()}

    def _update(self, loss: Tensor, *names: str) -> None:
        for name in names:
            self.optimisers[name].zero_grad()
        loss.backward()
        for name in names:
            self.optimisers[name].step()

    def _gan(self, images: Tensor, real: bool) -> Tensor:
        return adversarial_loss(self.config.gan, self.discriminator(images), real)

    def _encode(self, x: Tensor) -> list[Tensor]:
        """The features at every tap."""
        features = []
        for index in range(max(self.config.taps) + 1):
            x = self.generator[index](x)
            if index in self.config.taps:
                features.append(x)
        return features

    def _nce(
        self, queries: Sequence[Tensor], keys: Sequence[Tensor], stream: str, pairs: int, context: StepContext
    ) -> Tensor:
        ids = [self._ids(feature, tap, stream, context) for tap, feature in zip(self.config.taps, queries, strict=True)]
        rows = zip(self.heads(queries, ids), self.heads(keys, ids), strict=True)
        losses = [patch_nce(query, key, pairs, self.config.temperature).mean() for query, key in rows]
        return torch.stack(losses).mean() * self.config.lambda_nce

    def _robustness(self, clean: Sequence[Tensor], batch: Batch, context: StepContext) -> Tensor:
        config, taps = self.config.robust, self.config.robust.taps or self.config.taps
        one = int(context.draws.stream("robust", "choice").integers(len(taps)))
        drawn = taps if config.per_step == "all" else (taps[one],)
        losses = []
        for tap in drawn:
            head = self.config.taps.index(tap)
            normal, uniform = noise(tap, clean[head], batch, context)
            tau, magnitude = perturbation(normal, uniform, config.T, config.rule, config.least)
            translated = self.generator[tap + 1 :](clean[head] + tau)
            perturbed = self.generator[: tap + 1](translated)
            ids = self._ids(perturbed, tap, "robust", context)
            (one,), (other,) = (self.heads([feature], [ids], [head]) for feature in (clean[head], perturbed))
            losses.append(robustness_loss(one, other, magnitude, ids))
        return torch.stack(losses).sum() / len(taps)

    def _ids(self, feature: Tensor, tap: int, stream: str, context: StepContext) -> Tensor:
        return patch_ids([feature], [tap], self.config.patches, stream, context)[0]


class PublishedTraining(Training):
    """The same loader and initial weights, with one pair a step."""

    def __init__(self, config: JobConfig) -> None:
        super().__init__(config)
        method = config.method.build(seed=config.seed, global_batch=1)
        assert isinstance(method, Srunit)
        self.published = PublishedStep(method, config.optim, self.device)

    def update(self, batches: Sequence[Batch], context: StepContext) -> None:
        (batch,) = batches
        contiguous = {name: getattr(batch, name).contiguous() for name in ("source", "target")}
        self.published(dataclasses.replace(batch, **contiguous), context)  # type: ignore[type-var]


def compare(config: JobConfig, repetitions: int) -> list[Measurement]:
    """Seconds for each pair; 20 steps in a repetition on a GPU, 1 on a CPU."""
    one_pair = dataclasses.replace(config, optim=dataclasses.replace(config.optim, global_batch=1))
    trainings = {"published": PublishedTraining(one_pair), "ours": Training(config)}
    on_gpu = trainings["ours"].device.type == "cuda"

    def seconds(name: str) -> dict[str, float]:
        training = trainings[name]
        return {name: 1 / training.steps(20 if on_gpu else 1)["pairs_per_s"]}

    for training in trainings.values():
        for _ in range(WARM_UP if on_gpu or config.engine.compile == "true" else 1):
            training.step()
    found = interleaved([lambda: seconds("published"), lambda: seconds("ours")], repetitions)
    for training in trainings.values():
        training.close()
    gain = ratios(found["published"], found["ours"])
    return [
        *(Measurement(name, "s a pair", values) for name, values in found.items()),
        Measurement("published / ours", "", gain),
    ]


def parser() -> argparse.ArgumentParser:
    """Of what is not the job's."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--repetitions", type=int, default=3)
    own.add_argument("--json", type=Path)
    return own


if __name__ == "__main__":
    args, options = parser().parse_known_args(sys.argv[1:])
    job = parse_arguments(options)
    measured = compare(job, args.repetitions)
    if args.json:
        write_report(args.json, "published", flatten(job), measured)
    print(table(measured))
