"""Inception V3: the published names and shapes, the places where FID's network departs from the paper, loading."""

import hashlib
from io import BytesIO
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from infra.errors import UserError
from trainer.evaluation import inception
from trainer.evaluation.inception import InceptionV3, load_inception

BRANCHES = {
    "A": "branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 branch_pool",
    "B": "branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
    "C": "branch1x1 branch7x7_1 branch7x7_2 branch7x7_3 branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 "
    "branch7x7dbl_5 branch_pool",
    "D": "branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4",
    "E": "branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a "
    "branch3x3dbl_3b branch_pool",
}
BLOCKS = dict(zip(["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"], "AAABCCCCDEE", strict=True))
STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")


@pytest.fixture(scope="module")
def network() -> InceptionV3:
    """With weights out of a formula, which keep the scale of what flows through, so that no branch is silent."""
    network = InceptionV3().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            count, shape = module.weight.numel(), module.weight.shape
            wave = torch.arange(count, dtype=torch.float64).square().sin()
            module.weight.copy_(wave.view(shape) * 2 / (count / shape[0]) ** 0.5)
    return network


def saved(state: dict[str, Tensor], path: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> Path:
    """Write a state dict; with monkeypatch, let its hash pass for the published one."""
    file = BytesIO()
    torch.save(state, file)
    path.write_bytes(file.getvalue())
    if monkeypatch:
        monkeypatch.setattr(inception, "WEIGHTS_SHA256", hashlib.sha256(file.getvalue()).hexdigest())
    return path


def test_the_published_names(network: InceptionV3) -> None:
    convolutions = {*STEM, *(f"Mixed_{name}.{b}" for name, kind in BLOCKS.items() for b in BRANCHES[kind].split())}
    tensors = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
    expected = {f"{convolution}.{tensor}" for convolution in convolutions for tensor in tensors}
    assert set(network.state_dict()) == expected | {"fc.weight", "fc.bias"}
    assert len(convolutions) == 94


def test_the_published_shapes(network: InceptionV3) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6e.branch7x7dbl_4.conv.weight": (192, 192, 7, 1),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_1.conv.weight": (448, 2048, 1, 1),
        "fc.weight": (1008, 2048),
    }.items():
        assert shapes[name] == shape, name
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_850_960
    assert {module.eps for module in network.modules() if isinstance(module, nn.BatchNorm2d)} == {0.001}


def test_features_of_an_image(network: InceptionV3) -> None:
    inputs = {}
    for name in ("Mixed_5b", "Mixed_6a", "Mixed_7a", "Mixed_7b", "Mixed_7c"):
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: tuple(args[0].shape)})
        )
    (features,) = network(torch.arange(3 * 299 * 299, dtype=torch.float64).square().sin().float().view(1, 3, 299, 299))
    assert inputs == {
        "Mixed_5b": (1, 192, 35, 35),
        "Mixed_6a": (1, 288, 35, 35),
        "Mixed_7a": (1, 768, 17, 17),
        "Mixed_7b": (1, 1280, 8, 8),
        "Mixed_7c": (1, 2048, 8, 8),
    }
    assert features.shape == (2048,) and features.min() >= 0
    # One channel of each branch of the last block, as torch-fidelity's network has them in float64 with these weights.
    recorded = torch.tensor([0.488699, 0.154642, 0.220494, 0.266749, 0.414474, 0.367224])
    assert torch.allclose(features[[5, 325, 709, 1093, 1477, 1861]], recorded, rtol=1e-3)


@pytest.mark.parametrize(("block", "channels"), [("Mixed_5c", 256), ("Mixed_6b", 768), ("Mixed_7b", 1280)])
def test_average_poolings_leave_the_padding_out(network: InceptionV3, block: str, channels: int) -> None:
    """Of a constant map they are that constant, at the border too, and so is the whole pooling branch."""
    module = network.get_submodule(block)
    last = module.get_submodule("branch_pool.conv")
    assert isinstance(last, nn.Conv2d)
    pooled = module(torch.ones(1, channels, 5, 5))[:, -last.out_channels :]
    assert torch.allclose(pooled, pooled[:, :, 2:3, 2:3].expand_as(pooled), atol=1e-6)
    assert pooled.max() > 0


def test_the_last_block_pools_by_maximum(network: InceptionV3) -> None:
    """One high pixel then raises its whole neighbourhood to its own height, and not to a ninth of it."""
    x = torch.zeros(1, 2048, 5, 5)
    x[:, :, 2, 2] = 1
    pooled = network.Mixed_7c(x)[:, -192:]
    assert pooled.max() > 0
    assert torch.allclose(pooled[:, :, 1:4, 1:4], pooled[:, :, 2:3, 2:3].expand(1, 192, 3, 3), atol=1e-6)
    assert torch.allclose(pooled[:, :, 2, 2], network.Mixed_7c.branch_pool(x)[:, :, 2, 2], atol=1e-6)


@pytest.mark.parametrize("counters", [True, False], ids=["with counters", "without counters"])
def test_weights_come_back(
    network: InceptionV3, counters: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norm's counter of training steps is in newer state dicts only and says nothing here."""
    state = {
        key: value for key, value in network.state_dict().items() if counters or not key.endswith("batches_tracked")
    }
    loaded = load_inception(saved(state, tmp_path / "inception.pth", monkeypatch), "cpu")
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    own = loaded.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items())


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.pth .*No such file.*: fetch https://.*6726825d.pth"):
        load_inception(tmp_path / "none.pth", "cpu")


def test_any_other_file(tmp_path: Path) -> None:
    """Other tensors, a damaged download, a page of text: none of it is even unpickled."""
    path = saved({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    with pytest.raises(UserError, match=f"other.pth is not .* begins with {digest} in place of 6726825d; fetch https"):
        load_inception(path, "cpu")
