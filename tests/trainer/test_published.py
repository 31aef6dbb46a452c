import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infra.errors import UserError
from trainer.networks import PatchDiscriminator, ProjectionHeads, ResnetGenerator
from trainer.networks.norm import InstanceNorm2d
from trainer.networks.published import load_published, save_published


def generator(blocks: int = 6, antialias: bool = True, ngf: int = 2) -> ResnetGenerator:
    return ResnetGenerator(ngf=ngf, blocks=blocks, antialias=antialias)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def saved(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    "make",
    [generator, lambda: generator(antialias=False), lambda: PatchDiscriminator(ndf=2), lambda: ProjectionHeads([3, 8])],
    ids=["generator", "generator-noantialias", "discriminator", "heads"],
)
def test_written_and_read_again(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    first, second = make(), make()
    assert not same(first, second)
    save_published(first, tmp_path / "latest_net_G.pth")
    load_published(second, tmp_path / "latest_net_G.pth")
    assert same(first, second)
    assert os.listdir(tmp_path) == ["latest_net_G.pth"]


def test_written_form_is_a_plain_state_dict_of_its_own_memory(tmp_path: Path) -> None:
    net: ResnetGenerator = generator().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    flat = torch.zeros(100_000)  # an engine may keep all weights in one buffer
    bias = net.get_parameter("model.1.bias")
    bias.data = flat[: bias.numel()]
    save_published(net, tmp_path / "net.pth")
    state = torch.load(tmp_path / "net.pth", weights_only=True)
    assert type(state) is dict and list(state) == list(net.state_dict())
    assert all(value.is_contiguous() and value.device.type == "cpu" for value in state.values())
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())


def test_prefix_and_leftovers_are_dropped(tmp_path: Path) -> None:
    first, second = generator(antialias=False), generator(antialias=False)
    state = OrderedDict((f"module.{key}", value) for key, value in first.state_dict().items())
    for index in 2, 5, 8:  # instance norms of checkpoints before PyTorch 0.4
        norm = first.model[index]
        assert isinstance(norm, InstanceNorm2d)
        state[f"module.model.{index}.running_mean"] = torch.zeros(norm.num_features)
        state[f"module.model.{index}.running_var"] = torch.ones(norm.num_features)
        state[f"module.model.{index}.num_batches_tracked"] = torch.tensor(3)
    load_published(second, saved(state, tmp_path / "net.pth"))
    assert same(first, second)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (generator(blocks=9), r"lacks model\.18\.filt.*build the network with 9 residual blocks"),
        (generator(blocks=4), r"lacks model\.16\.conv_block\.1\.weight.*build the network with 4 residual blocks"),
        (generator(antialias=False), r"lacks model\.7\.filt.*build the network without anti-aliasing"),
        (generator(ngf=3), r"model\.1\.weight is \(3, 3, 7, 7\), the network's \(2, 3, 7, 7\); .*ngf"),
        (ProjectionHeads([3]), r"lacks model\.1\.weight"),
    ],
    ids=["more-blocks", "fewer-blocks", "antialias", "width", "kind"],
)
def test_other_architecture_is_named_and_changes_nothing(other: nn.Module, words: str, tmp_path: Path) -> None:
    net = generator()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    save_published(other, tmp_path / "net.pth")
    with pytest.raises(UserError, match=words) as caught:
        load_published(net, tmp_path / "net.pth")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_anti_aliased_checkpoint_for_a_plain_network(tmp_path: Path) -> None:
    save_published(generator(antialias=True), tmp_path / "net.pth")
    with pytest.raises(UserError, match="build the network with anti-aliasing"):
        load_published(generator(antialias=False), tmp_path / "net.pth")


class Malice:
    """A pickle of this makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("save", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state, protocol=2))])
def test_code_in_a_checkpoint_does_not_run(save: Callable[[Any, Path], object], tmp_path: Path) -> None:
    path, folder = tmp_path / "net.pth", tmp_path / "made"
    save({**generator().state_dict(), "model.1.bias": Malice(folder)}, path)
    with pytest.raises(UserError, match="could run code and is never loaded"):
        load_published(generator(), path)
    assert not folder.exists()


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    save_published(generator(), path)
    whole = path.read_bytes()
    for damage in (b"", b"no checkpoint", whole[: len(whole) // 2], whole[:-100], b"\x80\x02}q\x00.", b"PK\x03\x04"):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=str(path)) as caught:
            load_published(generator(), path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "state", [{}, {"epoch": 3}, [torch.zeros(1)], {"net": generator().state_dict()}, torch.zeros(2)]
)
def test_what_is_not_a_state_dict(state: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a state dict of one network"):
        load_published(generator(), saved(state, tmp_path / "net.pth"))


@pytest.mark.parametrize("path", ["absent.pth", "."])
def test_missing_file(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_published(generator(), tmp_path / path)


def test_half_precision_checkpoint_keeps_the_networks_type(tmp_path: Path) -> None:
    first, second = generator(), generator()
    state: dict[str, Tensor] = {key: value.half() for key, value in first.state_dict().items()}
    load_published(second, saved(state, tmp_path / "net.pth"))
    loaded = second.get_parameter("model.1.weight")
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded, first.get_parameter("model.1.weight"), rtol=1e-3, atol=1e-4)
