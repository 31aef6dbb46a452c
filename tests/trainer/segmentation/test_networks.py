import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infra.config import build
from infra.errors import UserError
from trainer.draws import generator
from trainer.segmentation.config import SegmenterModelConfig, init_weights
from trainer.segmentation.deeplab import ROWS, DeepLab, InvertedResidual, rounded
from trainer.segmentation.drn import BasicBlock, Drn

pytestmark = pytest.mark.slow


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


class Open(nn.Module):
    """A gate that lets everything through."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(())


def without_pooling(net: DeepLab) -> DeepLab:
    """Every feature then sees only what the convolutions reach."""
    for block in net.blocks:
        assert isinstance(block, InvertedResidual)
        block.squeeze_excite = nn.Identity()
    net.head.gate = nn.Sequential(Open())
    return net


def reach(net: nn.Module, width: int) -> tuple[int, int]:
    """How far left and right of its own pixel the middle column of the logits sees, in pixels.

    All weights positive, so that no ReLU is shut and no two paths cancel.
    """
    net = net.double().eval()
    for parameter in net.parameters():
        nn.init.constant_(parameter, 1 / parameter[0].numel() if parameter.ndim > 1 else 1)
    x = torch.ones(1, 3, 8, width, dtype=torch.float64, requires_grad=True)
    logits = net(x)
    column = logits.shape[3] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, 0, column], x)
    seen = gradient.abs().sum((0, 1, 2)).nonzero()
    own = column * width // logits.shape[3]
    return own - int(seen.min()), int(seen.max()) - own


@pytest.mark.parametrize("size", [(64, 128), (65, 131), (33, 40)])
@pytest.mark.parametrize(
    ("network", "output_stride", "stride"),
    [("drn-d-22", None, 8), ("deeplab", None, 8), ("deeplab", 32, 8), ("deeplab", 16, 8), ("deeplab", 8, 2), ("deeplab", 4, 1)],
)  # fmt: skip
def test_logits_of_any_image_size(network: str, output_stride: int | None, stride: int, size: tuple[int, int]) -> None:
    net = SegmenterModelConfig(network=network, width=0.25, output_stride=output_stride).build(19)
    expected = (2, 19, *(math.ceil(side / stride) for side in size))
    assert net(images(2, 3, *size)).shape == expected


def test_sizes_of_the_published_networks() -> None:
    # The authors of DRN count 16.4 M with the 1000 classes of ImageNet.
    assert parameters(Drn(1000)) == 16_393_752
    # Howard et al., Table 9: 0.47 M for V3-Small with half the channels in the last stage, LR-ASPP and 128 filters.
    assert parameters(DeepLab(19)) == 468_702


def test_drn_has_the_published_names() -> None:
    shapes = {name: tuple(value.shape) for name, value in Drn(1000).state_dict().items()}
    for name, shape in {
        "layer0.0.weight": (16, 3, 7, 7),
        "layer1.0.weight": (16, 16, 3, 3),
        "layer2.1.running_var": (32,),
        "layer3.0.downsample.0.weight": (64, 32, 1, 1),
        "layer4.1.bn2.bias": (128,),
        "layer6.0.conv1.weight": (512, 256, 3, 3),
        "layer7.0.weight": (512, 512, 3, 3),
        "layer8.1.num_batches_tracked": (),
        "fc.weight": (1000, 512, 1, 1),
    }.items():
        assert shapes[name] == shape
    convolutions = [name for name, shape in shapes.items() if len(shape) == 4]
    assert sum("downsample" not in name for name in convolutions) == 22


def test_drn_sees_527_pixels() -> None:
    layers_0_to_4 = 6 + 2 + 2 + (4 + 3 * 8) + (8 + 3 * 16)
    dilated_2_and_4, without_shortcuts = 4 * 32 + 4 * 64, 32 + 16
    assert 1 + layers_0_to_4 + dilated_2_and_4 + without_shortcuts == 527
    assert reach(Drn(1, width=1 / 16), width=1024) == (263, 263)


@pytest.mark.parametrize("output_stride", [32, 16])
def test_deeplab_sees_as_far_dilated_as_strided(output_stride: int) -> None:
    three_by_three, five_by_five = 2 + 4 + 8 + 16, 32 + 4 * 64 + 64 + 2 * 128
    deepest = 1 + three_by_three + five_by_five
    between_two = output_stride  # the logits are resized to the skip's stride
    left, right = reach(without_pooling(DeepLab(1, 0.25, output_stride)), width=1024)
    assert left + 1 + right == deepest + between_two


def test_dilation_computes_what_the_stride_skips() -> None:
    dilated, strided = (without_pooling(DeepLab(19, 0.25, stride)).eval() for stride in (16, 32))
    block = dilated.blocks[8]
    assert isinstance(block, InvertedResidual)
    block.shortcut = False  # which only a stride of 1 allows
    init_weights(dilated, torch.Generator().manual_seed(1))
    strided.load_state_dict(dilated.state_dict())
    deep: list[Tensor] = []
    for net in (dilated, strided):
        net.last.register_forward_hook(lambda module, inputs, output: deep.append(output))
        net(images(1, 3, 97, 160))
    assert deep[0].shape[2:] == (7, 10) and deep[1].shape[2:] == (4, 5)
    assert deep[1].std() > 0.1
    torch.testing.assert_close(deep[0][:, :, ::2, ::2], deep[1])


def test_shortcuts() -> None:
    x = images(1, 40, 6, 8)
    plain, widening = BasicBlock(40, 40, dilation=2), BasicBlock(40, 64, stride=2)
    row = ROWS[4]  # 40 channels in and out
    inverted, strided = (InvertedResidual(40, row, 1.0, stride, dilation=1) for stride in (1, 2))
    for block, last_norm in (
        (plain, plain.bn2),
        (widening, widening.bn2),
        (inverted, inverted.project[1]),
        (strided, strided.project[1]),
    ):
        block.eval()
        nn.init.zeros_(last_norm.get_parameter("weight"))  # only the shortcut is left
    torch.testing.assert_close(plain(x), x.relu())
    torch.testing.assert_close(widening(x), widening.downsample(x).relu())
    torch.testing.assert_close(inverted(x)[0], x)
    assert not strided(x)[0].any()


def test_deeplab_gates_see_the_whole_image() -> None:
    net = DeepLab(19, 0.25, 8).eval()
    init_weights(net, torch.Generator().manual_seed(1))
    x = images(1, 3, 32, 512).requires_grad_()
    (gradient,) = torch.autograd.grad(net(x)[0, :, 0, 0].square().sum(), x)
    assert gradient[..., -32:].any()


def test_widths_are_multiples_of_8() -> None:
    assert [rounded(channels) for channels in (1, 8, 12, 18, 22, 36, 44, 576)] == [8, 8, 16, 24, 24, 40, 48, 576]
    for width in (0.25, 0.5, 2.0):
        convolutions = [m for m in DeepLab(19, width).modules() if isinstance(m, nn.Conv2d) and m.out_channels != 19]
        assert all(convolution.out_channels % 8 == 0 for convolution in convolutions)


@pytest.mark.parametrize("network", ["deeplab", "drn-d-22"])
def test_initialisation(network: str) -> None:
    net = SegmenterModelConfig(network=network, width=0.25).build(19)
    init_weights(net, generator("cpu", 3, "init", "segmenter"))
    first = {name: value.clone() for name, value in net.state_dict().items()}
    net(images(2, 3, 64, 64))  # moves the running statistics
    torch.rand(7)  # the global generator plays no part
    init_weights(net, generator("cpu", 3, "init", "segmenter"))
    assert all(torch.equal(value, first[name]) for name, value in net.state_dict().items())
    for name, parameter in net.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float(not name.endswith("bias")))), name
        else:
            expected = math.sqrt(2 / parameter[0].numel())
            error = 5 / math.sqrt(2 * parameter.numel())
            assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(expected, rel=error), name
    init_weights(net, generator("cpu", 4, "init", "segmenter"))
    assert any(not torch.equal(value, first[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    "config",
    [SegmenterModelConfig(width=0.25, output_stride=8), SegmenterModelConfig(network="drn-d-22", width=0.25)],
    ids=["deeplab", "drn"],
)
def test_learns_four_images(config: SegmenterModelConfig) -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (4, 2, 4), generator=draw).repeat_interleave(16, 1).repeat_interleave(16, 2)
    colours = torch.randn(5, 3, generator=draw)
    x = colours[labels].permute(0, 3, 1, 2) + 0.3 * torch.randn(4, 3, 32, 64, generator=draw)
    net = config.build(5)
    init_weights(net, torch.Generator().manual_seed(1))
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    right = 0.0
    for _ in range(30):
        logits = F.interpolate(net(x), labels.shape[1:], mode="bilinear")
        right = float((logits.argmax(1) == labels).float().mean())
        optimiser.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimiser.step()
    assert right > 0.9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0.0}, "model.width = 0.0 multiplies channels"),
        ({"network": "unet"}, "'unet' is unknown: choose one of deeplab, drn-d-22"),
        ({"output_stride": 3}, "3 is unknown: choose one of 32, 16, 8, 4"),
        ({"network": "drn-d-22", "output_stride": 8}, "drn-d-22 always has 8: leave it out"),
    ],
)
def test_impossible_networks(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(SegmenterModelConfig, options)
