"""MUNIT: Huang et al. 2018, "Multimodal Unsupervised Image-to-Image Translation".

Each domain has an auto-encoder that parts an image into content and style. A translation is the content of one domain, decoded
by the other's decoder with a style of that domain: drawn from N(0, 1), or of an example image. a is the source domain, b the
target domain.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from infra.config import option
from infra.errors import UserError
from trainer.draws import generator
from trainer.losses import l1_distance, multi_scale_loss
from trainer.methods.base import Batch, Losses, Method, OptimiserSpec, Phase, StepContext, frozen
from trainer.methods.config import MethodConfig
from trainer.methods.parts.adversary import Right
from trainer.networks import init_weights
from trainer.networks.blocks import LayerNorm2d
from trainer.networks.config import MultiScaleConfig
from trainer.networks.munit import AutoEncoder
from trainer.networks.sizes import Sizes
from trainer.translation import Translation


@dataclass(frozen=True, kw_only=True)
class AutoEncoderConfig:
    ngf: int = option(64, "channels of the encoders' first convolutions", flag="--ngf")
    blocks: int = option(4, "residual blocks of the content encoder, and of the decoder")
    style: int = option(8, "numbers of a style")
    hidden: int = option(256, "width of the MLP that makes the decoder's shifts and scales from a style")

    def __post_init__(self) -> None:
        if min(self.ngf, self.blocks, self.style, self.hidden) < 1:
            raise UserError("--ngf and method.generator's blocks, style and hidden are counts: they must be 1 or more")

    def build(self) -> AutoEncoder:
        return AutoEncoder(ngf=self.ngf, blocks=self.blocks, style=self.style, hidden=self.hidden)


class MunitTranslation(Translation):
    directions = ("AtoB", "BtoA")

    def __init__(self, autoencoder_a: AutoEncoder, autoencoder_b: AutoEncoder, code: int) -> None:
        super().__init__()
        self.autoencoder_a, self.autoencoder_b, self.code = autoencoder_a, autoencoder_b, code

    @property
    def sizes(self) -> Sizes:
        return self.autoencoder_a.sizes

    def forward(self, x_NCHW: Tensor, code: Tensor | None = None, direction: str = "AtoB") -> Tensor:
        """Without a code: the mean style, 0."""
        style = x_NCHW.new_zeros(len(x_NCHW), self.code or 0) if code is None else code
        ours, theirs = self._in_order(direction)
        return theirs.decode(ours.encode_content(x_NCHW), style)

    def code_of(self, x_NCHW: Tensor, direction: str = "AtoB") -> Tensor:
        return self._in_order(direction)[1].style_encoder(x_NCHW)

    def _in_order(self, direction: str) -> tuple[AutoEncoder, AutoEncoder]:
        both = self.autoencoder_a, self.autoencoder_b
        return both if direction == "AtoB" else both[::-1]


@dataclass(frozen=True, kw_only=True)
class MunitConfig(MethodConfig):
    """Weights of Sec. 5.2 and of the published configurations; the perceptual loss is left out, since its weights cannot be
    had."""

    gan: str = option("lsgan", "adversarial loss", choices=("lsgan", "vanilla"))
    lambda_gan: float = option(1.0, "weight of the adversarial losses of the generators", adjustable=True)
    image: float = option(10.0, "weight of the reconstruction of images within a domain", adjustable=True)
    style: float = option(1.0, "weight of the reconstruction of styles", adjustable=True)
    content: float = option(1.0, "weight of the reconstruction of contents", adjustable=True)
    cycle: float = option(
        10.0, "weight of the cycle loss; the published code has 10 for photographs, 0 for shapes as in edges2shoes",
        adjustable=True,
    )  # fmt: skip
    generator: AutoEncoderConfig = field(default_factory=AutoEncoderConfig)
    discriminator: MultiScaleConfig = field(default_factory=MultiScaleConfig)

    def __post_init__(self) -> None:
        for name in ("lambda_gan", "image", "style", "content", "cycle"):
            if getattr(self, name) < 0:
                raise UserError(f"method.{name} = {getattr(self, name)} is negative: give 0 or more")

    def translation(self) -> MunitTranslation:
        return MunitTranslation(self.generator.build(), self.generator.build(), self.generator.style)

    def build(self, *, seed: int, global_batch: int) -> "Munit":
        return Munit(self, seed=seed)


# A million steps of one image; the rate is halved every 100,000 of them. In epochs of 1,231 images, as summer2winter has.
MUNIT = {
    "optim.lr": 1e-4, "optim.weight_decay": 1e-4, "optim.schedule": "step", "optim.step_factor": 0.5,
    "optim.step_epochs": 80, "optim.epochs": 800.0, "optim.decay_epochs": 0.0,
}  # fmt: skip
MUNIT_ON_TASKS = {"gta2city": {"optim.step_epochs": 4}}  # 24,966 images; the task's 20 epochs are half a million steps


@dataclass
class Encoded:
    """What the generators make of a batch. x_ba: from b's content with a style of a.

    Of each domain's images: content, style, the image decoded from both (`same`), its translation into the domain (`other`),
    content and style of that, and the image that the other one's translation gives back (`back`; None without a cycle loss).
    drawn: the style that `other` was decoded with.
    """

    content: Tensor
    style: Tensor
    drawn: Tensor
    same: Tensor
    other: Tensor
    content_again: Tensor
    style_again: Tensor
    back: Tensor | None = None


Outputs = dict[str, Any]  # by domain, a and b: Encoded, or for the discriminators the translations into it


class Munit(Method[Batch, Outputs]):
    """networks: autoencoder_a, autoencoder_b, discriminator_a, discriminator_b."""

    # D sees translations of styles of its own, and the generators play against the new D.
    phases = (
        Phase(name="discriminator", optimiser="discriminator", forward="shown"),
        Phase(name="generator", optimiser="generator", differentiates=True),
    )
    optimisers = tuple(
        OptimiserSpec(name=name, networks=(f"{network}_a", f"{network}_b"))
        for name, network in (("discriminator", "discriminator"), ("generator", "autoencoder"))
    )
    product: MunitTranslation

    def __init__(self, config: MunitConfig, *, seed: int) -> None:
        super().__init__()
        self.config = config
        product = config.translation()
        for domain in "ab":
            self.add_module(f"autoencoder_{domain}", product.get_submodule(f"autoencoder_{domain}"))
        for domain in "ab":
            self.add_module(f"discriminator_{domain}", config.discriminator.build(slope=0.2))
        self.product = product
        for name, network in self.networks("generator").items():
            draws = generator("cpu", seed, "init", name)
            init_weights(network, draws, "kaiming")
            for layer in network.modules():
                if isinstance(layer, LayerNorm2d):
                    nn.init.uniform_(layer.gain, generator=draws)
        for name, network in self.networks("discriminator").items():
            init_weights(network, generator("cpu", seed, "init", name), "normal")

    def autoencoder(self, domain: str) -> AutoEncoder:
        network = self.get_submodule(f"autoencoder_{domain}")
        assert isinstance(network, AutoEncoder)
        return network

    def sizes(self, images: int) -> Sizes:
        return self.product.sizes & self.config.discriminator.build(slope=0.2).sizes

    def forward(self, batch: Batch, context: StepContext, name: str = "translate") -> Outputs:
        images = {"a": batch.source, "b": batch.target}
        drawn = {
            domain: context.draws.normal(batch.slots.tolist(), (self.config.generator.style,), name, domain, like=x)
            for domain, x in images.items()
        }
        if name == "shown":
            contents = {domain: self.autoencoder(domain).encode_content(x) for domain, x in images.items()}
            return {here: self.autoencoder(here).decode(contents[there], drawn[here]) for here, there in ("ab", "ba")}
        content: dict[str, Tensor] = {}
        style: dict[str, Tensor] = {}
        other: dict[str, Tensor] = {}
        content_again: dict[str, Tensor] = {}
        style_again: dict[str, Tensor] = {}
        for here, image in images.items():
            content[here], style[here] = self.autoencoder(here).encode(image)
        for here, there in ("ab", "ba"):
            other[here] = self.autoencoder(here).decode(content[there], drawn[here])
            content_again[there], style_again[here] = self.autoencoder(here).encode(other[here])
        outputs = {}
        for here in "ab":
            decode, back = self.autoencoder(here).decode, None
            same = decode(content[here], style[here])
            if self.config.cycle:
                back = decode(content_again[here], style[here])
            outputs[here] = Encoded(
                content[here], style[here], drawn[here], same, other[here], content_again[here], style_again[here], back
            )
        return outputs

    def loss(self, phase: str, outputs: Outputs, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        evaluate = {"discriminator": self._discriminator_loss, "generator": self._generator_loss}[phase]
        total, named = evaluate(outputs, {"a": batch.source, "b": batch.target})
        return total, {name: value.detach() for name, value in named.items()}

    def _discriminator_loss(self, outputs: Outputs, images: dict[str, Tensor]) -> tuple[Tensor, Losses]:
        """Sec. 5.1: of both discriminators, real and fake added and not halved."""
        named, rights = Losses(), Losses()
        for domain, image in images.items():
            network = self.get_submodule(f"discriminator_{domain}")
            fakes, reals = zip(
                *(s.chunk(2) for s in network(torch.cat([outputs[domain].detach(), image]))), strict=True
            )
            fake, real = (multi_scale_loss(self.config.gan, each, each is reals) for each in (fakes, reals))
            named[f"D_{domain.upper()}"] = fake + real
            rights |= Right.of(self.config.gan, fakes, reals).named(f"D_{domain.upper()}")
        return torch.stack([*named.values()]).sum(), named | rights

    def _generator_loss(self, outputs: Outputs, images: dict[str, Tensor]) -> tuple[Tensor, Losses]:
        """Eqn. 5, with the adversarial loss of the published code and its cycle loss."""
        config, named, weighted = self.config, {}, []
        for domain, image in images.items():
            made: Encoded = outputs[domain]
            scores = frozen(self.get_submodule(f"discriminator_{domain}"), made.other)
            terms = {
                "G": (config.lambda_gan, multi_scale_loss(config.gan, scores, True)),
                "image": (config.image, l1_distance(made.same, image)),
                "style": (config.style, l1_distance(made.style_again, made.drawn)),
                "content": (config.content, l1_distance(made.content_again, made.content)),  # moves the target, too
            }
            if made.back is not None:
                terms["cycle"] = (config.cycle, l1_distance(made.back, image))
            for name, (weight, value) in terms.items():
                named[f"{name}_{domain.upper()}"] = value
                weighted.append(weight * value)
        total = torch.stack(weighted).sum()
        return total, named | {"G": total}
