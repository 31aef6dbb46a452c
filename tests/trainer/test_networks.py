import math

import pytest
import torch
from torch import Tensor, nn

from infra.errors import UserError
from trainer.networks import PatchDiscriminator, ProjectionHeads, ResnetGenerator, init_weights
from trainer.networks.heads import normalise, sample_patches
from trainer.networks.initialise import Rule
from trainer.networks.norm import InstanceNorm2d
from trainer.networks.resample import BlurDownsample, BlurUpsample
from trainer.networks.sizes import Sizes

TAPS = {True: [0, 4, 8, 12, 14], False: [0, 4, 8, 10, 12]}  # by antialias; 8 of the second is an instance norm


def small_generator(antialias: bool) -> ResnetGenerator:
    """ngf 4, three blocks, float64, with weights large enough that every path matters."""
    net = ResnetGenerator(ngf=4, blocks=3, antialias=antialias)
    init_weights(net, torch.Generator().manual_seed(1))
    for parameter in net.parameters():
        parameter.data = parameter.data * 40 if parameter.ndim > 1 else parameter.data + 0.1
    return net.double()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def perturbed_one_by_one(net: ResnetGenerator, perturbed: list[Tensor], taps: list[int]) -> list[Tensor]:
    """Eqn. 3 as it is written: for each tap, the rest of the generator and then its encoder."""
    return [net.encode(net.model[tap + 1 :](x), [tap])[0] for x, tap in zip(perturbed, taps, strict=True)]


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_shared_pass_equals_one_pass_per_tap(antialias: bool, batch: int) -> None:
    net, taps = small_generator(antialias), TAPS[antialias]
    taps = [taps[i] for i in (3, 0, 4, 1, 2)]  # any order will do
    features = [feature.detach() for feature in net.encode(images(batch, 3, 24, 32), taps)]
    noise = torch.Generator().manual_seed(2)
    perturbed = [(f + 0.1 * torch.randn(f.shape, generator=noise, dtype=f.dtype)).requires_grad_() for f in features]
    values, gradients = [], []
    for passes in (net.perturbed_features(perturbed, taps), perturbed_one_by_one(net, perturbed, taps)):
        assert [f.shape for f in passes] == [f.shape for f in features]
        loss = torch.stack([(weight * f.square()).mean() for weight, f in enumerate(passes, start=1)]).sum()
        values.append(passes)
        gradients.append(torch.autograd.grad(loss, [*perturbed, *net.parameters()]))
    torch.testing.assert_close(values[0], values[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-11)


def test_tap_at_an_instance_norm_reads_what_its_relu_leaves() -> None:
    net, x = small_generator(antialias=False), images(1, 3, 16, 16)
    convolved = net.model[:8](x)
    expected = nn.functional.instance_norm(convolved).relu()
    for feature in (*net.encode(x, [8]), *net.forward_with_features(x, [8])[1]):
        torch.testing.assert_close(feature, expected, rtol=1e-10, atol=1e-12)


def test_shared_pass_at_an_instance_norm_and_its_relu() -> None:
    net, taps = small_generator(antialias=False), [9, 8]  # both read what module 9 leaves
    perturbed = [feature + 0.1 for feature in net.encode(images(2, 3, 16, 16), taps)]
    expected = perturbed_one_by_one(net, perturbed, taps)
    torch.testing.assert_close(net.perturbed_features(perturbed, taps), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("antialias", [True, False])
def test_features_do_not_depend_on_the_way_they_are_asked_for(antialias: bool) -> None:
    net, x = small_generator(antialias), images(2, 3, 16, 24)
    taps = TAPS[antialias]
    y, features = net.forward_with_features(x, taps)
    torch.testing.assert_close(y, net(x), rtol=0, atol=0)
    assert y.shape == x.shape and y.abs().max() <= 1
    assert net.tap_channels(taps) == [feature.shape[1] for feature in features]
    for tap, feature in zip(taps, features, strict=True):
        torch.testing.assert_close(net.encode(x, [tap])[0], feature, rtol=0, atol=0)


@pytest.mark.parametrize("antialias", [True, False])
def test_every_module_can_be_tapped(antialias: bool) -> None:
    net = small_generator(antialias)
    taps = list(net.valid_taps)
    features = net.encode(images(1, 3, 16, 16), taps)
    assert net.tap_channels(taps) == [feature.shape[1] for feature in features]


def test_encode_stops_at_the_deepest_tap() -> None:
    net, x = small_generator(antialias=True), images(1, 3, 16, 16)
    for index in range(13, len(net.model)):
        net.model[index] = nn.Linear(1, 1)  # fails if it runs
    assert net.encode(x, [0, 12])[1].shape == (1, 16, 4, 4)


def test_the_discriminators_channels_double_up_to_eight_times() -> None:
    convolutions = [layer for layer in PatchDiscriminator(ndf=2, layers=5).model if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [2, 4, 8, 16, 16, 16, 1]


def test_images_of_a_batch_do_not_meet() -> None:
    net, discriminator = small_generator(antialias=True), PatchDiscriminator(ndf=4).double()
    x = images(3, 3, 32, 32)
    for network in (net, discriminator):
        torch.testing.assert_close(network(x)[1:2], network(x[1:2]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("taps", "words"), [([0, 99], "tap 99 does not exist.*0 to 25"), ([-1], "tap -1"), ([4, 4], "4, 4 name one twice")]
)
def test_impossible_taps(taps: list[int], words: str) -> None:
    net, x = small_generator(antialias=True), images(1, 3, 16, 16)
    for ask in (net.tap_channels, lambda t: net.encode(x, t), lambda t: net.perturbed_features([x] * len(t), t)):
        with pytest.raises(UserError, match=words):
            ask(taps)


def test_discriminator_does_not_normalise_its_first_and_last_convolution() -> None:
    net = PatchDiscriminator(ndf=4)
    assert [type(layer) for layer in list(net.model)[:4]] == [nn.Conv2d, nn.LeakyReLU, BlurDownsample, nn.Conv2d]
    assert sum(isinstance(layer, nn.InstanceNorm2d) for layer in net.model) == 3
    assert isinstance(net.model[-1], nn.Conv2d)


def test_sizes_of_the_published_networks() -> None:
    def parameters(net: nn.Module) -> int:
        return sum(parameter.numel() for parameter in net.parameters())

    generator = ResnetGenerator()
    assert parameters(generator) == 11_378_179
    assert parameters(PatchDiscriminator()) == 2_764_737
    assert generator.tap_channels([0, 4, 8, 12, 16]) == [3, 128, 256, 256, 256]


@pytest.mark.parametrize("antialias", [True, False])
def test_a_score_sees_70x70_pixels(antialias: bool) -> None:
    # Without norms, which see the whole image. The three blurs add 2, 4 and 8 pixels.
    layers = [layer for layer in PatchDiscriminator(ndf=4, antialias=antialias).model]
    net = nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.InstanceNorm2d))).double()
    x = images(1, 3, 160, 160).requires_grad_()
    score = net(x)
    (gradient,) = torch.autograd.grad(score[0, 0, score.shape[2] // 2, score.shape[3] // 2], x)
    seen = gradient.abs().sum(dim=(0, 1, 2)).nonzero()
    assert int(seen.max() - seen.min()) + 1 == (84 if antialias else 70)


@pytest.mark.parametrize(
    "net",
    [
        ResnetGenerator(ngf=16),
        ResnetGenerator(ngf=16, antialias=False),
        PatchDiscriminator(),
        ProjectionHeads([64, 256]),
    ],
)
def test_initialisation(net: nn.Module) -> None:
    init_weights(net, torch.Generator().manual_seed(3))
    first = {name: value.clone() for name, value in net.state_dict().items()}
    torch.rand(7)  # the global generator plays no part
    init_weights(net, torch.Generator().manual_seed(3))
    assert all(torch.equal(value, first[name]) for name, value in net.state_dict().items())
    for name, parameter in net.named_parameters():
        if parameter.ndim == 1:
            assert not parameter.any(), name
        else:
            fan_sum = (parameter.shape[0] + parameter.shape[1]) * math.prod(parameter.shape[2:])
            error = 5 / math.sqrt(2 * parameter.numel())
            assert float(parameter.detach().std()) == pytest.approx(0.02 * math.sqrt(2 / fan_sum), rel=error), name
    init_weights(net, torch.Generator().manual_seed(4))
    assert any(not torch.equal(value, first[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("rule", ["normal", "kaiming"])
@pytest.mark.parametrize("uniform_biases", [False, True])
def test_other_rules_of_initialisation(rule: Rule, uniform_biases: bool) -> None:
    net = nn.Sequential(
        nn.Conv2d(16, 64, 5), nn.ConvTranspose2d(64, 32, 3), nn.Linear(300, 700), nn.Conv2d(8, 8, 3, bias=False)
    )
    init_weights(net, torch.Generator().manual_seed(3), rule, uniform_biases=uniform_biases)
    fans = (16 * 25, 32 * 9, 300, 72)  # of a transposed convolution torch counts the outputs
    for layer, fan in zip(net, fans, strict=True):
        spread = 0.02 if rule == "normal" else math.sqrt(2 / fan)
        drawn = layer.state_dict()
        assert float(drawn["weight"].std()) == pytest.approx(spread, rel=5 / math.sqrt(2 * drawn["weight"].numel()))
        if "bias" in drawn:
            largest = float(drawn["bias"].abs().max())
            assert (0.8 / math.sqrt(fan) < largest <= 1 / math.sqrt(fan)) if uniform_biases else largest == 0


def test_patches_are_image_major() -> None:
    feature = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    ids = torch.tensor([7, 0, 19])
    expected = torch.stack([feature[b, :, i // 5, i % 5] for b in range(2) for i in ids.tolist()])
    assert torch.equal(sample_patches(feature, ids), expected)
    assert torch.equal(sample_patches(feature.to(memory_format=torch.channels_last), ids), expected)


def test_frozen_heads_pass_the_gradient_on() -> None:
    heads, feature = ProjectionHeads([3, 3], dim=8).double(), images(1, 3, 4, 4).requires_grad_()
    inputs = ([feature], [torch.tensor([1, 5])], [1])
    constant = {name: parameter.detach() for name, parameter in heads.named_parameters()}
    (rows,) = torch.func.functional_call(heads, constant, inputs)
    torch.testing.assert_close(rows, heads(*inputs)[0], rtol=0, atol=0)
    rows.sum().backward()
    assert feature.grad is not None and feature.grad.any()
    assert all(parameter.grad is None for parameter in heads.parameters())


@pytest.mark.parametrize("rule", ["cut", "srunit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_keep_full_precision_under_autocast(rule: str, dtype: torch.dtype) -> None:
    heads = ProjectionHeads([16], normalisation=rule)
    init_weights(heads, torch.Generator().manual_seed(5))  # outputs of about 1e-7: float16 would round them to 0
    feature, ids = images(1, 16, 4, 4).to(dtype), [torch.arange(16)]
    with torch.autocast("cpu", dtype=dtype):
        (rows,) = heads([feature], ids)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, heads([feature.float()], ids)[0], rtol=0, atol=0)


def test_normalisation_rules_differ_for_tiny_rows() -> None:
    rows = torch.tensor([[3e-7, 4e-7], [0.0, 0.0]], dtype=torch.float64)
    root = math.sqrt(0.5)
    expected = {"cut": [[0.5, 4 / 6], [0, 0]], "srunit": [[0.6, 0.8], [root, root]]}
    for rule, values in expected.items():
        torch.testing.assert_close(normalise(rows, rule), torch.tensor(values, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [3, 4])
def test_blurs_keep_a_flat_image_and_halve_or_double_it(size: int) -> None:
    flat = torch.full((2, 3, 5, 6), 0.7)
    for resampled, shape in (BlurDownsample(3, size)(flat), (3, 3)), (BlurUpsample(3, size)(flat), (10, 12)):
        torch.testing.assert_close(resampled, torch.full((2, 3, *shape), 0.7))


def test_unknown_normalisation() -> None:
    with pytest.raises(UserError, match="normalisation l1 does not exist: choose cut or srunit"):
        ProjectionHeads([3], normalisation="l1", use_mlp=False)([images(1, 3, 4, 4)], [torch.tensor([0])])


@pytest.mark.parametrize("batch", [1, 2])  # one image is where torch's own instance norm fails, see networks/norm.py
@pytest.mark.parametrize("antialias", [True, False])
def test_channels_last_gives_the_same_numbers_and_gradients(antialias: bool, batch: int) -> None:
    generator, discriminator = small_generator(antialias), PatchDiscriminator(ndf=4, antialias=antialias).double()
    x, taps = images(batch, 3, 32, 32), TAPS[antialias]
    parameters = [*generator.parameters(), *discriminator.parameters()]

    def run(image: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        outputs = [discriminator(generator(image))]
        outputs += generator.perturbed_features(generator.encode(image, taps), taps)
        loss = torch.stack([output.square().sum() for output in outputs]).sum()
        return outputs, torch.autograd.grad(loss, parameters)

    plain = run(x)
    for net in (generator, discriminator):
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.contiguous(memory_format=torch.channels_last)
    assert generator.model[1](generator.model[0](x)).is_contiguous(memory_format=torch.channels_last)
    relaid = run(x)
    torch.testing.assert_close(relaid[0], plain[0], rtol=1e-9, atol=1e-11)
    for gradient, expected in zip(relaid[1], plain[1], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()) + 1e-9)


@pytest.mark.parametrize("batch", [1, 2])
def test_instance_norm_gradient_in_any_layout(batch: int) -> None:
    x, gradient = images(batch, 4, 6, 5).requires_grad_(), images(batch, 4, 6, 5, seed=1)
    centred = x - x.mean((2, 3), keepdim=True)
    by_hand = centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
    y = InstanceNorm2d(4)(x)
    torch.testing.assert_close(y, by_hand)
    (expected,) = torch.autograd.grad(by_hand, x, gradient)
    for layout in torch.contiguous_format, torch.channels_last:
        (actual,) = torch.autograd.grad(y, x, gradient.contiguous(memory_format=layout), retain_graph=True)
        torch.testing.assert_close(actual, expected)


# ---- the sizes of images that networks take ---------------------------------------------------------------------------


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("layers", "smallest"), [(1, 6), (2, 12), (3, 24), (4, 48)])
def test_a_discriminator_knows_the_smallest_image_that_it_scores(layers: int, smallest: int, antialias: bool) -> None:
    net = PatchDiscriminator(ndf=2, layers=layers, antialias=antialias).double()
    assert net.sizes == Sizes(1, smallest)
    assert net(images(1, 3, smallest, smallest + 1)).shape[2] == 1
    with pytest.raises(RuntimeError):
        net(images(1, 3, smallest - 1, smallest))


@pytest.mark.parametrize("antialias", [True, False])
def test_a_generator_knows_which_images_keep_their_size(antialias: bool) -> None:
    net = small_generator(antialias)
    assert (net.sizes.multiple, net.sizes.first) == (4, 8)
    for height, width in ((8, 8), (8, 12)):
        assert net(images(1, 3, height, width)).shape[2:] == (height, width)
    assert all(net(images(1, 3, 8, side)).shape[3] != side for side in (9, 10, 11))
    # Images that are padded to a multiple need what the padding of the network itself needs.
    net(images(1, 3, net.sizes.smallest, 8))
    with pytest.raises(RuntimeError):
        net(images(1, 3, net.sizes.smallest - 1, 8))


def test_sizes_that_two_networks_take() -> None:
    both = Sizes(4, 5) & Sizes(6, 22)
    assert both == Sizes(12, 22) and both.first == 24 and str(both) == "multiples of 12 from 24 up"
    assert both.fit(24, 36) and not both.fit(24, 30) and not both.fit(12, 24)
    assert [both.up_to(side) for side in (23, 24, 35, 36)] == [None, 24, 24, 36]
    assert str(Sizes(smallest=17)) == "17 or more" and Sizes().fit(1, 1)
