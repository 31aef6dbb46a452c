"""What a training makes: a module that translates images, with what its users need to know of it."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from infra.errors import UserError
from trainer.networks import ResnetGenerator
from trainer.networks.sizes import Sizes


class Translation(nn.Module, ABC):
    """Translates (b, 3, h, w) in [-1, 1] to the same shape and range.

    Its children are networks, by the names of their files in a checkpoint.
    code: the length of the style vector that `forward` takes, or None; see `code_shape`. directions: those that `forward` knows.
    free: whether one graph of operators translates images of any size, so that it can be exported (trainer/export/).
    """

    code: int | None = None
    directions: tuple[str, ...] = ("AtoB",)
    free = True

    @property
    @abstractmethod
    def sizes(self) -> Sizes:
        """The images whose translation has their size. Others are padded to a multiple and cut back."""

    @abstractmethod
    def forward(self, x_NCHW: Tensor, code: Tensor | None = None, direction: str = "AtoB") -> Tensor:
        """code: (b, self.code), where there are styles; see `code_shape`."""

    def check_direction(self, direction: str) -> None:
        """UserError for one that it does not know."""
        if direction not in self.directions:
            raise UserError(f"this method translates {' and '.join(self.directions)}, not {direction}: "
                            "choose one of these, or a method with both directions such as cyclegan")  # fmt: skip

    def code_shape(self, height: int, width: int) -> tuple[int, ...] | None:
        """Of what `forward` takes beside an image of this size, N(0, 1) drawn anew for each image; None: nothing."""
        return None if self.code is None else (self.code,)

    def code_of(self, x_NCHW: Tensor, direction: str = "AtoB") -> Tensor | None:
        """The styles (b, self.code) of example images of the domain that is translated to; None where there are none."""
        return None


class OneGenerator(Translation):
    """One generator, one direction, no styles: CUT and what follows it."""

    def __init__(self, generator: ResnetGenerator) -> None:
        super().__init__()
        self.generator = generator

    @property
    def sizes(self) -> Sizes:
        return self.generator.sizes

    def forward(self, x_NCHW: Tensor, code: Tensor | None = None, direction: str = "AtoB") -> Tensor:
        return self.generator(x_NCHW)


class TwoGenerators(Translation):
    """A generator each way, as CycleGAN has them; no styles."""

    directions = ("AtoB", "BtoA")

    def __init__(self, generator_a: ResnetGenerator, generator_b: ResnetGenerator) -> None:
        """generator_a: from the source to the target domain."""
        super().__init__()
        self.generator_a, self.generator_b = generator_a, generator_b

    @property
    def sizes(self) -> Sizes:
        return self.generator_a.sizes

    def forward(self, x_NCHW: Tensor, code: Tensor | None = None, direction: str = "AtoB") -> Tensor:
        network = self.generator_a if direction == "AtoB" else self.generator_b
        return network(x_NCHW)
