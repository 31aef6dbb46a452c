"""Replay of recorded numbers of the works that SemST is built on, in float64: SCC's mutual information and HRDA's fusion. SRC's
losses are replayed in test_parity_src.py."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.cuts import Cuts
from tests.trainer.parity.recorded import Recording, assert_same, each
from trainer.losses import mutual_information
from trainer.losses.information import SIGNS
from trainer.methods.semst import SemstConfig
from trainer.networks.fusion import ScaleFusion, paste, slide


@each("scc*.npz")
@pytest.mark.parametrize("kernel", SIGNS)
def test_mutual_information(recording: Recording, kernel: str) -> None:
    for tag in recording.before(f"_{kernel}"):
        x, y = recording[f"{tag}_x"].requires_grad_(), recording[f"{tag}_y"].requires_grad_()
        loss = -mutual_information(x.flatten(1), y.flatten(1), kernel).mean()
        assert_same(loss, recording[f"{tag}_{kernel}"])
        for gradient, name in zip(torch.autograd.grad(loss, [x, y]), "xy", strict=True):
            assert_same(gradient, recording[f"{tag}_{kernel}_grad_{name}"])


def recorded_box(box: Tensor) -> tuple[slice, slice]:
    y1, y2, x1, x2 = box.tolist()
    return slice(y1, y2), slice(x1, x2)


@each("hrda_fusion*.npz")
def test_fusion_of_a_window(recording: Recording) -> None:
    fusion = ScaleFusion(4).double()
    for tag in recording.before("_box_y1_y2_x1_x2"):
        coarse, fine, logits = (recording[f"{tag}_{name}"].requires_grad_() for name in ("global", "local", "logits"))
        rows, columns = recorded_box(recording[f"{tag}_box_y1_y2_x1_x2"])
        corners = [(columns.start, rows.start)] * len(coarse)
        fused = fusion.fuse_windows(coarse, fine, logits.sigmoid(), corners)
        assert_same(fused, recording[f"{tag}_fused"])
        mask = paste(torch.ones_like(fine[:, :1, ::2, ::2]), [(x // 2, y // 2) for x, y in corners], coarse.shape[2:])
        assert_same((1 - logits.sigmoid() * mask) * coarse, recording[f"{tag}_weighted_global"])
        weighted = (fused * recording[f"{tag}_gradw"]).sum()
        gradients = torch.autograd.grad(weighted, [coarse, fine, logits])
        for gradient, name in zip(gradients, ("global", "local", "logits"), strict=True):
            assert_same(gradient, recording[f"{tag}_grad_{name}"])


@each("hrda_fusion*.npz")
def test_sliding_windows(recording: Recording) -> None:
    image, boxes = recording["slide_image"], [recorded_box(box) for box in recording["slide_boxes"]]
    asked = []

    def predicted(window: Tensor) -> Tensor:
        (index,) = [i for i, (rows, columns) in enumerate(boxes) if torch.equal(image[:, :, rows, columns], window)]
        asked.append(index)
        return recording["slide_local_predictions"][index : index + 1]

    merged = slide(predicted, image, boxes[0][0].stop)
    assert sorted(asked) == list(range(len(boxes)))
    assert_same(merged, recording["slide_local_merged"])
    fused = ScaleFusion(4).double().fuse(recording["slide_global"], merged, recording["slide_logits"].sigmoid())
    assert_same(fused, recording["slide_fused"])


@each("hrda_fusion*.npz")
def test_windows_lie_where_the_published_ones_do(recording: Recording) -> None:
    """The draws are others, the places are the same."""
    for name in (key for key in recording.keys if key.startswith("boxes_")):
        height, width, side = 64, 96, 32
        assert name.startswith(f"boxes_{height}x{width}_crop{side}_divisible8")
        published = {(int(x), int(y)) for y, _, x, _ in np.asarray(recording.arrays[name])}
        view = SemstConfig(local=side).view
        cuts = Cuts(
            view, seed=0, domain="source", image_size=(width, height), crop=(width, height), global_batch=1, flip=False
        )
        ours = {cuts(position).box for position in range(600)}
        assert ours == {(x, y) for x in range(0, width - side + 1, 8) for y in range(0, height - side + 1, 8)}
        assert published <= ours
