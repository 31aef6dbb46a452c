"""The image buffer of Shrivastava et al. 2017 (Sec. 2.3), as CycleGAN uses it: the discriminator sees old fakes too."""

import torch
from torch import Tensor

from trainer.draws import Draws


class ImageBuffer:
    """Up to `capacity` earlier translations of one slot of the global batch.

    One buffer for each slot, not for each rank, and draws from outside: so what the discriminator sees does not
    depend on the number of ranks. A capacity of 0 passes every image through.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._images: list[Tensor] = []

    def query(self, image: Tensor, uniform: float, index: int) -> Tensor:
        """Give a translation, get the one that the discriminator shall see; neither carries a gradient.

        image: (C, H, W). uniform: a draw of U(0, 1); index: a draw from range(capacity). Until the buffer is full,
        the image is kept and comes back, and the draws are not used. Then, where uniform > 1/2, the image kept at
        `index` comes back and the new one takes its place; otherwise the new one comes back and is not kept.
        """
        image = image.detach()
        if len(self._images) < self.capacity:
            self._images.append(image.clone())
        elif self.capacity and uniform > 0.5:
            kept, self._images[index] = self._images[index], image.clone()
            return kept
        return image

    def state_dict(self) -> dict[str, Tensor]:
        """{"images": (n, C, H, W)}, in order; (0,) while nothing is kept."""
        return {"images": torch.stack(self._images) if self._images else torch.empty(0)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._images = [image.clone() for image in state["images"]]


class ImageBuffers:
    """The image buffers of all slots of the global batch, for one kind of translation.

    name: of its draws, and of its state in a checkpoint. images: how many all slots together keep, at least one each; 0:
    every image passes through.
    """

    def __init__(self, name: str, images: int, global_batch: int) -> None:
        self.name = name
        self.capacity = -(-images // global_batch)  # of each slot
        self._of_slot: dict[int, ImageBuffer] = {}  # that this rank has met
        self._restored: dict[str, Tensor] = {}  # of all slots, from a checkpoint

    def show(self, images: Tensor, slots: Tensor, draws: Draws) -> Tensor:
        """What the discriminator shall see in place of translations (b, C, H, W) of these slots (b,); no gradient."""
        if not self.capacity:
            return images.detach()
        seen = []
        for image, slot, stream in zip(images, slots.tolist(), draws.per_slot(slots, self.name), strict=True):
            uniform, place = float(stream.uniform()), int(stream.integers(self.capacity))
            seen.append(self._buffer(slot, image.device).query(image, uniform, place))
        return torch.stack(seen, out=torch.empty_like(images.detach()))  # in the layout of the images

    def _buffer(self, slot: int, device: torch.device) -> ImageBuffer:
        if slot not in self._of_slot:
            self._of_slot[slot] = ImageBuffer(self.capacity)
            if (images := self._restored.get(f"{self.name}/{slot}")) is not None:
                self._of_slot[slot].load_state_dict({"images": images.to(device)})
        return self._of_slot[slot]

    def state(self) -> dict[str, Tensor]:
        """ "name/slot" -> images, of the slots that this rank has met."""
        return {f"{self.name}/{slot}": buffer.state_dict()["images"] for slot, buffer in self._of_slot.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over the union of all ranks' `state`."""
        # A rank takes a slot's images when it first meets the slot, so that it never reports those of other ranks.
        self._of_slot, self._restored = {}, state
