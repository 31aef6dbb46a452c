"""Several networks as one segmenter."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from infra.errors import UserError
from tests.trainer.segmentation.test_method import CONTEXT, Labelled, batch
from trainer.checkpointer import Checkpointer
from trainer.segmentation.config import SegmenterModelConfig, init_weights
from trainer.segmentation.ensemble import Ensemble
from trainer.segmentation.method import Segmentation
from trainer.segmentation.trained import load_trained

CLASSES = 3


def ensemble(members: int = 3) -> Ensemble:
    network = SegmenterModelConfig(width=0.25, output_stride=4, members=members).build(CLASSES)
    assert isinstance(network, Ensemble)
    init_weights(network, torch.Generator().manual_seed(0))
    return network


def test_probabilities_of_members_that_differ_are_averaged() -> None:
    network, images = ensemble().eval(), torch.randn(2, 3, 16, 24)
    scores = [member(images) for member in network.members]
    assert all((scores[0] - other).abs().max() > 0.1 for other in scores[1:])
    seen: Tensor = network(images)
    mean = torch.stack([each.softmax(1) for each in scores]).mean(0)
    torch.testing.assert_close(seen.exp(), mean)
    torch.testing.assert_close(seen.softmax(1), mean)


@pytest.mark.parametrize("bf16", [False, True])
def test_each_member_learns_by_itself(bf16: bool) -> None:
    network, data = ensemble(), batch(0, 2)
    method = Segmentation(network)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs = method(data, CONTEXT)
        total, named = method.loss("segmenter", outputs, data, CONTEXT)
    total.backward()
    shared = [parameter.grad for parameter in network.parameters()]
    losses, alone = [], []
    for member in network.members:
        member.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            single = Segmentation(member)
            loss, _ = single.loss("segmenter", single(data, CONTEXT), data, CONTEXT)
        loss.backward()
        losses.append(loss.item())
        alone += [parameter.grad for parameter in member.parameters()]
    assert total.item() == pytest.approx(sum(losses)) and named["CE"].item() == pytest.approx(sum(losses) / 3)
    for together, own in zip(shared, alone, strict=True):
        assert together is not None and own is not None
        torch.testing.assert_close(together, own, rtol=1e-2 if bf16 else 1e-4, atol=1e-2 if bf16 else 1e-5)


def test_a_run_of_several_is_loaded_as_one(tmp_path: Path) -> None:
    config = {"model.network": "deeplab", "model.width": 0.25, "model.output_stride": 8, "model.members": 2}
    network = SegmenterModelConfig(width=0.25, output_stride=8, members=2).build(19)
    init_weights(network, torch.Generator().manual_seed(0))
    state = {"step": 1, "config": config, "image_size": [24, 16], "label_space": "cityscapes19"}
    Checkpointer(tmp_path / "checkpoints", keep=1).save(1, {"segmenter": network.state_dict()}, state)
    image = (torch.rand(16, 24, 3) * 255).byte().numpy()
    loaded = load_trained(tmp_path)
    x = (torch.from_numpy(image).float() / 127.5 - 1).permute(2, 0, 1)[None]
    torch.testing.assert_close(loaded.logits(x), network.eval()(x))
    assert loaded(image).shape == (16, 24)


@pytest.mark.parametrize("members", [0, -1, 17])
def test_impossible_numbers_are_refused(members: int) -> None:
    with pytest.raises(UserError, match="number of networks"):
        SegmenterModelConfig(members=members)


def test_labels_are_those_of_each_member() -> None:
    """Two members of which one is always right and one always wrong: the loss is the mean, not that of the mean."""
    labels = torch.zeros(1, 2, 2, dtype=torch.uint8)
    right, wrong = torch.zeros(1, CLASSES, 2, 2), torch.zeros(1, CLASSES, 2, 2)
    right[:, 0], wrong[:, 1] = 9.0, 9.0
    data = Labelled(torch.zeros(1), labels, torch.tensor([0]))
    _, named = Segmentation(ensemble(2)).loss("segmenter", torch.cat([right, wrong]), data, CONTEXT)
    assert named["CE"].item() == pytest.approx(4.5, abs=0.01) and named["pxAcc"].item() == 0.5
