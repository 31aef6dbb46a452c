"""A segmenter as a thing to use: an image in, a label map of the same size out, whatever network is behind it."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from infra.errors import UserError
from trainer.exact import exact_arithmetic

IGNORE = 255  # the trainId of no class
LABEL_SPACES = {"cityscapes19": 19}  # number of classes, whose trainIds count from 0


class Segmenter:
    """Labels images with a network.

    logits: normalised float32 (1, 3, h, w) on `device` to class scores (1, C, h', w'), h' and w' of any size.
    name: what people know it by.
    input_size: (width, height) that the network sees; None for the image's own.
    mean, std: per channel, in the network's order: it sees (pixel / scale - mean) / std.
    channels: the network's order, "RGB" or "BGR".
    trainids: for each of the C channels the trainId it stands for, 255 for none of the classes.
    label_space: what the trainIds mean, e.g. "cityscapes19".

    UserError for an unknown label space, or trainids outside it.
    """

    def __init__(
        self,
        logits: Callable[[Tensor], Tensor],
        *,
        name: str,
        input_size: tuple[int, int] | None,
        mean: Sequence[float],
        std: Sequence[float],
        scale: float,
        channels: str = "RGB",
        trainids: Sequence[int],
        label_space: str = "cityscapes19",
        device: torch.device | str = "cpu",
    ) -> None:
        self.logits, self.name, self.input_size, self.device = logits, name, input_size, device
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32, device=device) for values in (mean, std))
        self.scale, self.channels = scale, channels
        self.trainids, self.label_space = tuple(trainids), label_space
        if label_space not in LABEL_SPACES:
            raise UserError(
                f"the segmenter {name} has the unknown label space {label_space!r}: choose {' or '.join(LABEL_SPACES)}"
            )
        classes = set(range(LABEL_SPACES[label_space]))
        kept = [channel for channel, trainid in enumerate(trainids) if trainid in classes]
        if not kept or not set(trainids) <= classes | {IGNORE}:
            raise UserError(
                f"the trainids of the segmenter {name} leave the classes 0..{len(classes) - 1} of {label_space}: "
                f"give one of these per output channel, or {IGNORE} for none of them"
            )
        self._kept = torch.tensor(kept, device=device)
        self._trainid_of_kept = np.array([trainids[channel] for channel in kept], np.uint8)

    @torch.no_grad()
    def __call__(self, image_HWC: np.ndarray) -> np.ndarray:
        """uint8 RGB (H, W, 3) to uint8 trainIds (H, W); channels that stand for no class are never chosen.

        The image is resized to the network's input size (bicubic, with antialiasing, as in the CUT supplement), the
        scores are resized back (bilinear), and the label is chosen at the image's size: labels are never resampled.
        UserError if the network's output does not fit `trainids`.
        """
        return self._trainid_of_kept[self._scores(image_HWC).argmax(0).cpu().numpy()]

    @torch.no_grad()
    def sure(self, image_HWC: np.ndarray, least: float) -> np.ndarray:
        """The same, but 255 where the class that is chosen has a probability below `least`, among those that can be chosen."""
        probability, chosen = self._scores(image_HWC).softmax(0).max(0)
        labels = self._trainid_of_kept[chosen.cpu().numpy()]
        return np.where(probability.cpu().numpy() >= least, labels, np.uint8(IGNORE))

    def _scores(self, image_HWC: np.ndarray) -> Tensor:
        """Of the channels that stand for a class, (C, H, W)."""
        with exact_arithmetic():
            logits_NChw = self.logits(self._network_input(image_HWC))
        if logits_NChw.ndim != 4 or logits_NChw.shape[1] != len(self.trainids):
            raise UserError(
                f"the segmenter {self.name} gives an output of shape {tuple(logits_NChw.shape)}, not scores of the "
                f"{len(self.trainids)} classes in its trainids (1, {len(self.trainids)}, h, w): correct trainids"
            )
        scores_NCHW = F.interpolate(
            logits_NChw.index_select(1, self._kept).float(), image_HWC.shape[:2], mode="bilinear", antialias=True
        )
        return scores_NCHW[0]

    def _network_input(self, image_HWC: np.ndarray) -> Tensor:
        if self.input_size is not None:
            image = Image.fromarray(image_HWC).resize(self.input_size, Image.Resampling.BICUBIC)
            image_HWC = np.asarray(image)
        if self.channels == "BGR":
            image_HWC = image_HWC[..., ::-1]
        x_HWC = torch.from_numpy(image_HWC.astype(np.float32)).to(self.device) / self.scale
        return ((x_HWC - self.mean) / self.std).permute(2, 0, 1)[None].contiguous()


def check_label_space(segmenter: Segmenter, label_space: str | None) -> None:
    """UserError if a segmenter's labels do not mean what those of the task or data mean."""
    if segmenter.label_space != label_space:
        raise UserError(
            f"the segmenter {segmenter.name} labels in {segmenter.label_space} but the data in {label_space}: "
            "choose a segmenter trained for the data's classes"
        )
