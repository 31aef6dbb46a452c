"""DRIT: Lee et al. 2018, "Diverse Image-to-Image Translation via Disentangled Representations"; with mode seeking DRIT++ (Lee et
al. 2020).

An image is parted into a content, which both domains share, and an attribute of its domain. a is the source domain, b the
target domain. Slots of the global batch with even numbers are "encoded": translated with attributes of images. The odd ones are
the real images beside translations with attributes drawn from N(0, 1).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from infra.config import option
from infra.errors import UserError
from trainer.draws import generator
from trainer.losses import adversarial_loss, confusion_loss, l1_distance, multi_scale_loss
from trainer.losses.attributes import mode_seeking_loss, normal_divergence
from trainer.methods.base import Batch, Losses, Method, OptimiserSpec, Phase, StepContext, frozen
from trainer.methods.config import MethodConfig
from trainer.methods.parts.adversary import ACCURACY, Right
from trainer.networks import init_weights
from trainer.networks.config import MultiScaleConfig
from trainer.networks.drit import (
    SLOPE,
    Attribute,
    AttributeEncoder,
    ConcatGenerator,
    ContentDiscriminator,
    ContentEncoder,
    FeatureGenerator,
)
from trainer.networks.initialise import fan_in
from trainer.networks.multi_scale import MultiScaleDiscriminator
from trainer.networks.sizes import Sizes
from trainer.networks.split import split_batch
from trainer.translation import Translation

OTHER = {"a": "b", "b": "a"}
CONTENT_RATE, CONTENT_CLIP = 0.4, 5.0  # of the content discriminator: share of the learning rate, largest gradient


@dataclass(frozen=True, kw_only=True)
class DritGeneratorConfig:
    ngf: int = option(64, "channels of the encoders' first convolutions", flag="--ngf")
    code: int = option(8, "numbers of an attribute")
    attributes: str = option(
        "concat", "how they enter: as planes beside the features, or by 1x1 convolutions (where shapes change)",
        choices=("concat", "feature-wise"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if min(self.ngf, self.code) < 1:
            raise UserError("--ngf and method.generator.code are counts: they must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class DritDiscriminatorConfig(MultiScaleConfig):
    scales: int = option(
        3, "scales that a discriminator sees: the image, its half, its quarter, …; 1: another, deeper one"
    )
    spectral_norm: bool = option(False, "with spectral norm")

    def build(self, *, slope: float = SLOPE) -> MultiScaleDiscriminator:
        deeper = {"kernel": 3, "layers": 6} if self.scales == 1 else {}
        return MultiScaleDiscriminator(
            ndf=self.ndf, scales=self.scales, slope=slope, spectral=self.spectral_norm, **deeper
        )


class DritTranslation(Translation):
    directions = ("AtoB", "BtoA")

    def __init__(self, config: DritGeneratorConfig) -> None:
        super().__init__()
        self.code = config.code
        concat = config.attributes == "concat"
        self.content_encoder = ContentEncoder(ngf=config.ngf)
        self.attribute_encoder = AttributeEncoder(ngf=config.ngf, code=config.code, concat=concat)
        self.generator = (ConcatGenerator if concat else FeatureGenerator)(ngf=config.ngf, code=config.code)

    @property
    def sizes(self) -> Sizes:
        return self.content_encoder.sizes(after=2) & self.attribute_encoder.sizes

    def forward(self, x_NCHW: Tensor, code: Tensor | None = None, direction: str = "AtoB") -> Tensor:
        """Without a code: the mean attribute, 0."""
        attribute = x_NCHW.new_zeros(len(x_NCHW), self.code or 0) if code is None else code
        return self.generator(self.content_encoder(x_NCHW, direction[0].lower()), attribute, direction[-1].lower())

    def code_of(self, x_NCHW: Tensor, direction: str = "AtoB") -> Tensor:
        """The mean of what the published code draws."""
        return self.attribute_encoder(x_NCHW, direction[-1].lower()).mean


@dataclass(frozen=True, kw_only=True)
class DritConfig(MethodConfig):
    """The weights are those of the paper (Sec. 4) and of the published code."""

    cycle: float = option(10.0, "weight of the cross-cycle loss", adjustable=True)
    same: float = option(10.0, "weight of the reconstruction of images within a domain", adjustable=True)
    latent: float = option(10.0, "weight of the reconstruction of drawn attributes", adjustable=True)
    kl: float = option(0.01, "weight of the distance of attributes from N(0, 1)", adjustable=True)
    content: float = option(0.01, "weight of the mean square of contents (the paper has none)", adjustable=True)
    content_gan: float = option(1.0, "weight of the adversarial loss of contents", adjustable=True)
    mode_seeking: float = option(0.0, "weight of mode seeking; DRIT++: 1", adjustable=True)
    second: str = option(
        "recomputed", "the update for drawn attributes: after the other, on a forward pass of its own; or joint with it",
        choices=("recomputed", "joint"),
    )  # fmt: skip
    content_layers: int = option(
        3, "strided layers of the content discriminator; 1 or 2, not in the paper, take crops below 212"
    )
    every: int = option(3, "of so many steps one updates everything, the others the content discriminator alone")
    generator: DritGeneratorConfig = field(default_factory=DritGeneratorConfig)
    discriminator: DritDiscriminatorConfig = field(default_factory=DritDiscriminatorConfig)

    def __post_init__(self) -> None:
        for name in ("cycle", "same", "latent", "kl", "content", "content_gan", "mode_seeking"):
            if getattr(self, name) < 0:
                raise UserError(f"method.{name} = {getattr(self, name)} is negative: give 0 or more")
        if min(self.every, self.content_layers) < 1:
            raise UserError("method.every and method.content_layers are counts: they must be 1 or more")

    def translation(self) -> DritTranslation:
        return DritTranslation(self.generator)

    def build(self, *, seed: int, global_batch: int) -> "Drit":
        return Drit(self, seed=seed)


# 1200 epochs are 400 with an update of everything. The published rate falls one epoch later.
DRIT = {
    "optim.global_batch": 2, "optim.lr": 1e-4, "optim.weight_decay": 1e-4,
    "optim.epochs": 600.0, "optim.decay_epochs": 600.0,
}  # fmt: skip


@dataclass
class Translated:
    """Of one domain: the encoded images' content (with noise), and what is decoded into the domain.

    drawn: with the drawn codes, from the other domain's content, one for each code. In a full pass also: attribute, of the
    encoded images; other: with it and the other domain's content; same: with both their own; back: with what the
    translations were encoded to.
    """

    content: Tensor
    drawn: list[Tensor] = field(default_factory=list)
    attribute: Attribute | None = None
    other: Tensor | None = None
    same: Tensor | None = None
    back: Tensor | None = None


@dataclass
class Outputs:
    """domains: a and b. codes: those drawn, the same for both domains; the second is for mode seeking."""

    domains: dict[str, Translated]
    codes: list[Tensor] = field(default_factory=list)


class Drit(Method[Batch, Outputs]):
    """networks: content_encoder, attribute_encoder, generator; of each domain discriminator_a for translations with attributes
    of images and discriminator_a2 for those with drawn ones; content_discriminator."""

    product: DritTranslation
    content_encoder: ContentEncoder
    attribute_encoder: AttributeEncoder
    generator: ConcatGenerator | FeatureGenerator

    def __init__(self, config: DritConfig, *, seed: int) -> None:
        super().__init__()
        self.config = config
        product = config.translation()
        for name, network in product.named_children():
            self.add_module(name, network)
        discriminators = [f"discriminator_{which}" for which in ("a", "a2", "b", "b2")]
        for name in discriminators:
            self.add_module(name, config.discriminator.build())
        self.content_discriminator = ContentDiscriminator(4 * config.generator.ngf, config.content_layers)
        for name, network in self.named_children():
            _initialise(network, generator("cpu", seed, "init", name))
        self.product = product
        self.optimisers = (
            OptimiserSpec(name="discriminators", networks=tuple(discriminators)),
            OptimiserSpec(
                name="content_discriminator", networks=("content_discriminator",), rate=CONTENT_RATE, clip=CONTENT_CLIP
            ),
            OptimiserSpec(name="generator", networks=tuple(dict(product.named_children()))),
        )
        self.phases = tuple(self._phases(config.every))

    def _phases(self, every: int) -> list[Phase]:
        last = (every - 1,)
        phases = [
            Phase(name="discriminators", optimiser="discriminators", every=every, at=last),
            Phase(name="content", optimiser="content_discriminator", every=every, at=last),
            Phase(name="generator", optimiser="generator", differentiates=True, every=every, at=last),
        ]
        if every > 1:
            alone = tuple(range(every - 1))
            phases.insert(
                0, Phase(name="content", optimiser="content_discriminator", forward="encode", every=every, at=alone)
            )
        if self.config.second == "recomputed":
            moves = ("content_encoder", "generator")
            phases.append(
                Phase(name="drawn", optimiser="generator", forward="drawn", differentiates=True, moves=moves,
                      every=every, at=last)
            )  # fmt: skip
        return phases

    def compiled_parts(self) -> list[nn.Module]:
        # Spectral norm moves its vector on in each pass, and compiled code would find it moved in the backward pass of another.
        moves = self.config.discriminator.spectral_norm
        return [part for part in super().compiled_parts() if not (moves and isinstance(part, MultiScaleDiscriminator))]

    def sizes(self, images: int) -> Sizes:
        if images % 2:
            raise UserError(f"drit takes images by twos, an encoded and a random one, and each rank would take {images} at a "
                            "time: give --global-batch an even number for each rank and each accumulation")  # fmt: skip
        content = self.content_encoder.sizes(after=self.content_discriminator.smallest)
        return content & self.attribute_encoder.sizes & self.config.discriminator.build().sizes

    # ---- forward passes -----------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, context: StepContext, name: str = "translate") -> Outputs:
        """encode: contents alone. drawn: translations with drawn codes as well. translate: everything."""
        images, slots = {"a": batch.source[::2], "b": batch.target[::2]}, batch.slots.tolist()[::2]

        def normal(*stream: str) -> Tensor:
            return context.draws.normal(slots, (self.config.generator.code,), *stream, like=images["a"])

        def drawn(attribute: Attribute, *stream: str) -> Tensor:
            return attribute.mean if attribute.log_variance is None else attribute.drawn(normal(*stream))

        def encode(x: Tensor | None, domain: str, *stream: str) -> Tensor:
            """With noise on every element (Sec. 3.5 of DRIT++); the same in each pass of a step."""
            assert x is not None
            content = self.content_encoder(x, domain)
            # Drawn channels-last, as features are.
            channels, height, width = content.shape[1:]
            noise = context.draws.normal(slots, (height, width, channels), "noise", *stream, like=content)
            return content + noise.permute(0, 3, 1, 2)

        outputs = Outputs({domain: Translated(encode(x, domain, domain)) for domain, x in images.items()})
        if name == "encode":
            return outputs
        contents = {domain: made.content for domain, made in outputs.domains.items()}
        outputs.codes = [normal("code", which) for which in ("1", "2")[: 2 if self.config.mode_seeking else 1]]
        for domain, made in outputs.domains.items():
            there = contents[OTHER[domain]]
            pairs = [(there, code) for code in outputs.codes]
            if name == "translate":
                made.attribute = self.attribute_encoder(images[domain], domain)
                attribute = drawn(made.attribute, "attribute", domain)
                pairs += [(there, attribute), (contents[domain], attribute)]
            made.drawn = self._decode(pairs, domain)
            if name == "translate":
                *made.drawn, made.other, made.same = made.drawn
        if name == "translate":
            # The content of a domain's images is found in their translation into the other domain.
            again = {
                domain: encode(outputs.domains[OTHER[domain]].other, OTHER[domain], domain, "again") for domain in images
            }  # fmt: skip
            for domain, made in outputs.domains.items():
                attribute = drawn(self.attribute_encoder(made.other, domain), "attribute", domain, "again")
                (made.back,) = self._decode([(again[domain], attribute)], domain)
        return outputs

    def _decode(self, pairs: list[tuple[Tensor, Tensor]], domain: str) -> list[Tensor]:
        """Contents and codes decoded into a domain, all in one pass."""
        contents, codes = zip(*pairs, strict=True)
        images = self.generator(torch.cat(contents), torch.cat(codes), domain)
        return list(split_batch(images, [len(content) for content in contents]))

    # ---- losses -------------------------------------------------------------------------------------------------------

    def loss(self, phase: str, outputs: Outputs, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        """The terms, with their weights; G and G2 are the sums that the two updates of the generator minimise."""
        terms = {
            "discriminators": self._discriminator_terms, "content": self._content_terms,
            "generator": self._generator_terms, "drawn": self._drawn_terms,
        }[phase](outputs, batch)  # fmt: skip
        total = _sum(terms)
        named = terms | {name: total for name in [{"generator": "G", "drawn": "G2"}.get(phase)] if name}
        if phase == "generator" and self.config.second == "joint":
            drawn = self._drawn_terms(outputs, batch)
            named |= drawn | {"G2": _sum(drawn)}
            total = total + _sum(drawn)
        return total, {name: value.detach() for name, value in named.items()}

    def _discriminator_terms(self, outputs: Outputs, batch: Batch) -> Losses:
        """Real and fake added and not halved; with two drawn codes the real images count twice."""
        terms: Losses = {}
        for domain, images in ("a", batch.source), ("b", batch.target):
            made = outputs.domains[domain]
            assert made.other is not None
            for which, real, fakes in (("", images[::2], [made.other]), ("2", images[1::2], made.drawn)):
                network = self.get_submodule(f"discriminator_{domain}{which}")
                name, score_real = f"D_{domain.upper()}{which}", network(real)
                score_fakes = [network(fake.detach()) for fake in fakes]
                of_real = multi_scale_loss("vanilla", score_real, True)
                of_fake = [multi_scale_loss("vanilla", score, False) for score in score_fakes]
                terms[name] = len(fakes) * of_real + torch.stack(of_fake).sum()
                terms |= Right.of("vanilla", [each for score in score_fakes for each in score], score_real).named(name)
        return terms

    def _content_terms(self, outputs: Outputs, batch: Batch) -> Losses:
        """Eqn. 1: contents of the target domain are real, those of the source fake."""
        scores = {domain: self.content_discriminator(made.content.detach()) for domain, made in outputs.domains.items()}
        losses = [adversarial_loss("vanilla", score, domain == "b") for domain, score in scores.items()]
        right = Right.of("vanilla", [scores["a"]], [scores["b"]])
        return {"D_content": torch.stack(losses).sum(), **right.named("D_content")}

    def _generator_terms(self, outputs: Outputs, batch: Batch) -> Losses:
        """Eqn. 5 without the reconstruction of drawn attributes, which is the other update's."""
        config, terms = self.config, Losses()
        for domain, images in ("a", batch.source[::2]), ("b", batch.target[::2]):
            made, letter = outputs.domains[domain], domain.upper()
            assert made.other is not None and made.same is not None and made.back is not None and made.attribute
            mean, log_variance = made.attribute
            apart = mean.square().mean() if log_variance is None else normal_divergence(mean, log_variance)
            scores = frozen(self.get_submodule(f"discriminator_{domain}"), made.other)
            content = made.content.to(torch.promote_types(made.content.dtype, torch.float32))
            undecided = confusion_loss(frozen(self.content_discriminator, made.content))
            terms |= {
                f"G_{letter}": multi_scale_loss("vanilla", scores, True),
                f"G_content_{letter}": config.content_gan * undecided,
                f"cycle_{letter}": config.cycle * l1_distance(made.back, images),
                f"same_{letter}": config.same * l1_distance(made.same, images),
                f"kl_{letter}": config.kl * apart,
                f"content_{letter}": config.content * content.square().sum() / content.numel(),
            }
        return terms

    def _drawn_terms(self, outputs: Outputs, batch: Batch) -> Losses:
        """For translations with drawn attributes: the adversarial loss, Eqn. 6 of the supplement, and mode seeking."""
        config, terms = self.config, Losses()
        for domain, made in outputs.domains.items():
            letter, network = domain.upper(), self.get_submodule(f"discriminator_{domain}2")
            scores = [multi_scale_loss("vanilla", frozen(network, image), True) for image in made.drawn]
            found = frozen(self.attribute_encoder, made.drawn[0], domain)
            terms[f"G_{letter}2"] = torch.stack(scores).sum()
            terms[f"latent_{letter}"] = config.latent * l1_distance(found.mean, outputs.codes[0])
            if config.mode_seeking:
                terms[f"seek_{letter}"] = config.mode_seeking * mode_seeking_loss(*made.drawn, *outputs.codes)
        return terms


def _sum(terms: Losses) -> Tensor:
    return torch.stack([term for name, term in terms.items() if not name.startswith(ACCURACY)]).sum()


def _initialise(network: nn.Module, draws: torch.Generator) -> None:
    """N(0, 0.02^2) for the weights of convolutions, and torch's own draws for everything else."""
    init_weights(network, draws, "normal", uniform_biases=True)
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            bound = fan_in(layer.weight) ** -0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=draws)
