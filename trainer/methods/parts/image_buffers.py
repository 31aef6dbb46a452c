"""The image buffer of Shrivastava et al. 2017 (Sec. 2.3), as CycleGAN uses it: the discriminator sees old fakes too."""

import torch
from torch import Tensor

from trainer.draws import Draws


class ImageBuffers:
    """Earlier translations of one kind: a buffer for each slot of the global batch.

    One for each slot, not for each rank, and draws from outside: so what the discriminator sees does not depend on the number
    of ranks. All are one tensor on the device of the images, read and written by index, so that the host never waits for it and
    a step's operations are the same while a buffer fills and once it is full.

    name: of its draws, and of its state in a checkpoint. images: how many all slots together keep, at least one each; 0:
    every image passes through.
    """

    def __init__(self, name: str, images: int, global_batch: int) -> None:
        self.name, self.slots = name, global_batch
        self.capacity = -(-images // global_batch)  # of each slot
        self._kept: Tensor | None = None  # (slots * capacity, C, H, W), those of slot s from s * capacity on, in order
        self._counts: Tensor | None = None  # (slots,) int64: how many of them are in use
        self._rows: dict[tuple[int, ...], Tensor] = {}  # slots of a micro-batch -> the same, (b,) int64 on the device
        self._met: dict[int, None] = {}  # the slots that this rank has met, in that order
        self._restored: dict[str, Tensor] = {}  # of all slots, from a checkpoint

    def show(self, images: Tensor, slots: Tensor, draws: Draws) -> Tensor:
        """What the discriminator shall see in place of translations (b, C, H, W) of these slots (b,); no gradient."""
        if not self.capacity:
            return images.detach()
        pairs = [(stream.uniform(), stream.integers(self.capacity)) for stream in draws.per_slot(slots, self.name)]
        uniform, place = (torch.stack(each).to(images.device, non_blocking=True) for each in zip(*pairs, strict=True))
        return self.exchange(images, slots, uniform, place)

    def exchange(self, images: Tensor, slots: Tensor, uniform: Tensor, place: Tensor) -> Tensor:
        """The same, with the draws: uniform (b,) of U(0, 1), place (b,) int64 of range(capacity). The slots differ.

        Until a buffer is full, the image is kept and comes back, and the draws are not used. Then, where uniform > 1/2, the
        image kept at `place` comes back and the new one takes its place; otherwise the new one comes back and is not kept.
        """
        images = images.detach()
        rows = self._rows_of(images, slots)
        assert self._kept is not None and self._counts is not None
        count = self._counts[rows]
        fills = count < self.capacity
        swaps = ~fills & (uniform > 0.5)
        places = rows * self.capacity + torch.where(fills, count, place * swaps)
        kept = self._kept.index_select(0, places)
        shown = torch.where(swaps[:, None, None, None], kept, images, out=torch.empty_like(images))
        self._kept.index_copy_(0, places, torch.where((fills | swaps)[:, None, None, None], images, kept))
        self._counts.index_add_(0, rows, fills.long())
        return shown

    def _rows_of(self, images: Tensor, slots: Tensor) -> Tensor:
        """These slots on the device of the images, where there is room for them now. What they had in a checkpoint is put in
        place when they are first met, so that a rank never reports images of other ranks' slots."""
        given = tuple(slots.tolist())
        if given not in self._rows:
            if self._kept is None:
                last = images.is_contiguous(memory_format=torch.channels_last)
                room = images.new_zeros(self.slots * self.capacity, *images.shape[1:])
                self._kept = room.contiguous(memory_format=torch.channels_last) if last else room
                self._counts = torch.zeros(self.slots, dtype=torch.int64, device=images.device)
            for slot in given:
                if slot not in self._met:
                    self._met[slot] = None
                    self._restore(slot, self._restored.get(f"{self.name}/{slot}"))
            self._rows[given] = torch.tensor(given).to(images.device, non_blocking=True)
        return self._rows[given]

    def _restore(self, slot: int, images: Tensor | None) -> None:
        assert self._kept is not None and self._counts is not None
        if images is not None and len(images):
            self._kept[slot * self.capacity :][: len(images)] = images.to(self._kept.device)
            self._counts[slot] = len(images)

    def state(self) -> dict[str, Tensor]:
        """ "name/slot" -> images (n, C, H, W), in order, of the slots that this rank has met; before the first step of a run
        that goes on, all that its checkpoint has: it may be saved again then, after an evaluation that was owed."""
        if self._kept is None or self._counts is None:
            return {key: images for key, images in self._restored.items() if key.startswith(f"{self.name}/")}
        counts, kept = self._counts.tolist(), self._kept.unflatten(0, (self.slots, self.capacity))
        return {f"{self.name}/{slot}": kept[slot, : counts[slot]].clone() for slot in self._met}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over the union of all ranks' `state`."""
        self._kept = self._counts = None
        self._rows, self._met, self._restored = {}, {}, state
