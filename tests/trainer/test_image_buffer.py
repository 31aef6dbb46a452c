import random

import pytest
import torch
from torch import Tensor

from trainer.draws import Draws
from trainer.methods.parts.image_buffers import ImageBuffers

SLOT = torch.tensor([0])


def image(value: float) -> Tensor:
    return torch.full((3, 2, 2), float(value))


def buffer_of(capacity: int) -> ImageBuffers:
    """The buffer of a single slot."""
    return ImageBuffers("buffer", capacity, 1)


def query(buffer: ImageBuffers, image: Tensor, uniform: float, place: int) -> Tensor:
    """What comes back for an image, with these draws."""
    return buffer.exchange(image[None], SLOT, torch.tensor([uniform]), torch.tensor([place]))[0]


def kept(buffer: ImageBuffers) -> list[float]:
    return [float(image.mean()) for image in buffer.state().get("buffer/0", [])]


def replay(buffer: ImageBuffers, places: range) -> list[float]:
    """What the buffer gives back for images 0, 1, …; the draws belong to the place."""
    given = []
    for place in places:
        draw = random.Random(place)
        given.append(float(query(buffer, image(place), draw.random(), draw.randrange(3)).mean()))
    return given


def test_no_capacity_passes_every_image_through() -> None:
    buffer = buffer_of(0)
    batch = torch.stack([image(i) for i in range(3)])
    assert torch.equal(buffer.show(batch, torch.arange(3), Draws(0, 0)), batch)
    assert not buffer.state()


def test_full_buffer_swaps_or_passes_through() -> None:
    buffer = buffer_of(2)
    assert [float(query(buffer, image(i), 0.9, 0).mean()) for i in (10, 11)] == [10, 11]
    assert kept(buffer) == [10, 11]
    assert float(query(buffer, image(12), 0.5, 1).mean()) == 12  # not above 1/2: not kept
    assert float(query(buffer, image(13), 0.51, 1).mean()) == 11
    assert kept(buffer) == [10, 13]


def test_restored_buffer_goes_on_exactly() -> None:
    whole = replay(buffer_of(3), range(40))
    for stop in (0, 2, 3, 17):
        first, saved_again, second = buffer_of(3), buffer_of(3), buffer_of(3)
        given = replay(first, range(stop))
        saved_again.load_state(first.state())
        second.load_state(saved_again.state() | {"other/0": torch.ones(1, 3, 2, 2)})
        assert second.state().keys() <= {"buffer/0"}
        assert given + replay(second, range(stop, 40)) == whole


def test_kept_images_are_copies_without_gradient() -> None:
    buffer, batch = buffer_of(2), torch.ones(2, 3, 2, 2, requires_grad=True) * 1.0
    assert not query(buffer, batch[0], 0.0, 0).requires_grad
    saved = buffer.state()["buffer/0"]
    batch.data.fill_(7)  # a training step reuses its memory
    assert float(query(buffer, batch[1], 0.0, 0).mean()) == 7
    assert float(query(buffer, batch[0], 0.9, 0).mean()) == 1
    batch.data.fill_(9)
    assert float(query(buffer, batch[0], 0.9, 0).mean()) == 7
    assert float(saved.mean()) == 1


class Lists:
    """The buffers as their paper has them, each a list."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.images: dict[int, list[Tensor]] = {}

    def show(self, images: Tensor, slots: Tensor, draws: Draws) -> Tensor:
        shown = []
        for image, slot in zip(images.detach(), slots.tolist(), strict=True):
            stream, kept = draws.stream("buffer", slot), self.images.setdefault(slot, [])
            uniform, place = float(stream.uniform()), int(stream.integers(self.capacity))
            if len(kept) < self.capacity:
                kept.append(image.clone())
            elif uniform > 0.5:
                kept[place], image = image.clone(), kept[place]
            shown.append(image)
        return torch.stack(shown)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_buffers_of_many_slots_are_lists_of_images(layout: torch.memory_format) -> None:
    """In two micro-batches, from the first image on, through a save, and in the layout of the images."""
    buffers, lists = ImageBuffers("buffer", 10, 4), Lists(3)
    for step in range(30):
        if step in (2, 11):
            saved = buffers.state()
            buffers = ImageBuffers("buffer", 10, 4)
            buffers.load_state(saved)
        for slots in (torch.tensor([2, 0]), torch.tensor([3, 1])):
            batch = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(step)).contiguous(
                memory_format=layout
            )
            shown = buffers.show(batch, slots, Draws(0, step))
            assert torch.equal(shown, lists.show(batch, slots, Draws(0, step)))
            assert shown.is_contiguous(memory_format=layout)
    for slot, images in lists.images.items():
        assert torch.equal(buffers.state()[f"buffer/{slot}"], torch.stack(images))
