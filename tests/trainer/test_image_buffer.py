import random

import torch
from torch import Tensor

from trainer.methods.parts.image_buffers import ImageBuffer


def image(value: float) -> Tensor:
    return torch.full((3, 2, 2), float(value))


def replay(buffer: ImageBuffer, places: range) -> list[float]:
    """What the buffer gives back for images 0, 1, …; the draws belong to the place."""
    given = []
    for place in places:
        draw = random.Random(place)
        given.append(float(buffer.query(image(place), draw.random(), draw.randrange(3)).mean()))
    return given


def test_no_capacity_passes_every_image_through() -> None:
    buffer = ImageBuffer(0)
    assert [float(buffer.query(image(i), 0.9, 0).mean()) for i in range(3)] == [0, 1, 2]
    assert buffer.state_dict()["images"].numel() == 0


def test_full_buffer_swaps_or_passes_through() -> None:
    buffer = ImageBuffer(2)
    assert [float(buffer.query(image(i), 0.9, 0).mean()) for i in (10, 11)] == [10, 11]
    assert float(buffer.query(image(12), 0.5, 1).mean()) == 12  # not above 1/2: not kept
    assert float(buffer.query(image(13), 0.51, 1).mean()) == 11
    assert buffer.state_dict()["images"][:, 0, 0, 0].tolist() == [10, 13]


def test_restored_buffer_goes_on_exactly() -> None:
    whole = replay(ImageBuffer(3), range(40))
    for stop in (0, 2, 3, 17):
        first, second = ImageBuffer(3), ImageBuffer(3)
        given = replay(first, range(stop))
        second.load_state_dict(first.state_dict())
        assert given + replay(second, range(stop, 40)) == whole


def test_kept_images_are_copies_without_gradient() -> None:
    buffer, batch = ImageBuffer(2), torch.ones(2, 3, 2, 2, requires_grad=True) * 1.0
    assert not buffer.query(batch[0], 0.0, 0).requires_grad
    saved = buffer.state_dict()
    batch.data.fill_(7)  # a training step reuses its memory
    assert float(buffer.query(batch[1], 0.0, 0).mean()) == 7
    assert float(buffer.query(batch[0], 0.9, 0).mean()) == 1
    batch.data.fill_(9)
    assert float(buffer.query(batch[0], 0.9, 0).mean()) == 7
    assert float(saved["images"].mean()) == 1
