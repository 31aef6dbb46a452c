"""A translation as one function of tensors, of free size, as the files for other programs have it."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from infra.errors import UserError, first_line
from trainer.translation import Translation

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LEAST, LARGEST = 8, 16384  # pixels each way; of a map of one pixel some operators are others
TRACED = 64  # pixels each way at least, of the image that the graph is recorded with


@dataclass(frozen=True)
class Form:
    """What a file is to take and give.

    precision: what the network computes in; norms keep float32 statistics, and images stay float32 (or uint8). uint8: images as
    they are in memory, uint8 RGB (n, h, w, 3) of any size; otherwise float32 (n, 3, h, w) in [-1, 1], sides as `Sizes` says.
    size: (width, height) of all images; None: they are free.
    """

    direction: str = "AtoB"
    precision: str = "fp32"
    uint8: bool = False
    size: tuple[int, int] | None = None

    @property
    def images(self) -> str:
        """In words, for whoever is handed the file."""
        if self.uint8:
            return "uint8 (batch, height, width, 3), RGB in 0..255"
        return "float32 (batch, 3, height, width), RGB in [-1, 1]"


class Graph(nn.Module):
    """Images, and where the translation has styles or noise the draws of N(0, 1), to images.

    UserError for a form that the translation does not have.
    """

    def __init__(self, translation: Translation, form: Form) -> None:
        super().__init__()
        translation.check_direction(form.direction)
        self.form, self.dtype, self.sizes = form, PRECISIONS[form.precision], translation.sizes
        self._check_size(translation)
        self.translation = copy.deepcopy(translation).cpu().eval().requires_grad_(False).to(self.dtype)
        self.translation.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def _check_size(self, translation: Translation) -> None:
        if self.form.size is None:
            if not translation.free:
                raise UserError("this method translates window by window, as many as an image has, which no file of free size "
                                "holds: give --size WIDTHxHEIGHT, that of your images")  # fmt: skip
            return
        fits = min(self.form.size) >= self.sizes.smallest if self.form.uint8 else self.sizes.fit(*self.form.size)
        if not fits:
            sides = f"{self.sizes.smallest} or more" if self.form.uint8 else str(self.sizes)
            raise UserError("images of {}x{} do not fit this network: give --size with sides that are {}".format(
                *self.form.size, sides))  # fmt: skip

    @property
    def drawn(self) -> str | None:
        """What is drawn for each image beside it: "style" (n, code), "noise" (n, 1, h, w), or None for nothing."""
        shape = self.translation.code_shape(1, 1)
        return None if shape is None else "style" if len(shape) == 1 else "noise"

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("image", self.drawn) if self.drawn else ("image",)

    @property
    def smallest(self) -> int:
        """The smallest side of an image that a file of free size takes."""
        return max(LEAST, self.sizes.smallest if self.form.uint8 else self.sizes.first)

    def forward(self, image: Tensor, drawn: Tensor | None = None) -> Tensor:
        if not self.form.uint8:
            return self._translated(image, drawn)
        height, width = image.shape[1:3]
        x_NCHW = self._extended(image.permute(0, 3, 1, 2).float() / 127.5 - 1)
        if drawn is not None and drawn.ndim == 4:
            drawn = self._extended(drawn)
        y_NCHW = self._translated(x_NCHW, drawn)
        for dim, size in (2, height), (3, width):  # no slice, of which the recorder wants to know that it fits
            y_NCHW = y_NCHW.index_select(dim, torch.arange(size, device=image.device))
        return ((y_NCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)

    def _translated(self, x_NCHW: Tensor, drawn: Tensor | None) -> Tensor:
        code = None if drawn is None else drawn.to(self.dtype)
        return self.translation(x_NCHW.to(self.dtype), code, self.form.direction).float()

    def _extended(self, x_NCHW: Tensor) -> Tensor:
        """By reflection to the multiple that the networks take, as `Translator` does; in operators that take any size."""
        multiple = self.sizes.multiple
        for dim in (2, 3) if multiple > 1 else ():
            size = x_NCHW.shape[dim]
            at = torch.arange((size + multiple - 1) // multiple * multiple, device=x_NCHW.device)
            x_NCHW = x_NCHW.index_select(dim, torch.where(at < size, at, 2 * (size - 1) - at))
        return x_NCHW

    def sample(self, count: int, width: int, height: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Inputs for images of that size: soft shapes under noise, since norms blow up the rounding of plain ones."""
        draws = torch.Generator().manual_seed(seed)
        soft = nn.functional.interpolate(
            torch.rand(count, 3, 5, 5, generator=draws), (height, width), mode="bicubic", align_corners=True
        )
        image = (0.8 * soft + 0.2 * torch.rand(count, 3, height, width, generator=draws)).clamp(0, 1)
        image = (image * 255).to(torch.uint8).permute(0, 2, 3, 1) if self.form.uint8 else image * 2 - 1
        shape = self.translation.code_shape(height, width)
        return (image,) if shape is None else (image, torch.randn(count, *shape, generator=draws))

    def sizes_like(self, width: int, height: int) -> tuple[int, int]:
        """Those nearest above that the graph takes; the one that it is bound to."""
        if self.form.size:
            return self.form.size
        multiple = 1 if self.form.uint8 else self.sizes.multiple
        sides = (max(side, self.smallest) for side in (width, height))
        return tuple(-(-side // multiple) * multiple for side in sides)  # type: ignore[return-value]


def record(graph: Graph) -> ExportedProgram:
    """The graph of operators, with free batch and, unless the form binds them, height and width. UserError if there is none."""
    inputs = graph.sample(2, *graph.sizes_like(TRACED, TRACED + 32))
    try:
        with torch.no_grad():
            return torch.export.export(graph, inputs, dynamic_shapes=_free(graph))
    except Exception as error:  # of many kinds
        raise UserError(f"this network cannot be recorded as a graph of operators ({first_line(error)}): use the checkpoint "
                        "with launch/translate.py instead") from error  # fmt: skip


def _free(graph: Graph) -> list[dict[int, object]]:
    batch = Dim("batch", min=1, max=1024)
    free: dict[int, object] = {0: batch}
    maps = dict(free)
    if graph.form.size is None:
        multiple = 1 if graph.form.uint8 else graph.sizes.multiple
        sides = [
            multiple * Dim(name, min=-(-graph.smallest // multiple), max=LARGEST // multiple)
            for name in ("height", "width")
        ]
        first = 1 if graph.form.uint8 else 2
        free |= {first: sides[0], first + 1: sides[1]}
        maps |= {2: sides[0], 3: sides[1]}
    if graph.drawn is None:
        return [free]
    return [free, maps if graph.drawn == "noise" else {0: batch}]
