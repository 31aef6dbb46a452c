"""The image buffer of Shrivastava et al. 2017 (Sec. 2.3), as CycleGAN uses it: the discriminator sees old fakes too."""

import torch
from torch import Tensor


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
