"""Replay of recorded numbers, part by part: what a function or network of the published CUT and SRUNIT code computes,
ours computes, in float64. Whole training steps are replayed in test_parity_cut.py."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipelines.cuts import zoomed_size
from pipelines.decode import EncodedCrop, PillowDecoder
from pipelines.images import encode, multiple_of, resize, to_array
from tests.trainer.parity.recorded import Recording, assert_same, each
from trainer.losses import adversarial_loss, patch_nce, perturbation, robustness_loss
from trainer.methods.parts.image_buffers import ImageBuffers
from trainer.networks import PatchDiscriminator, ProjectionHeads, ResnetGenerator, init_weights
from trainer.networks.heads import sample_patches
from trainer.networks.norm import InstanceNorm2d
from trainer.networks.resample import BlurDownsample, BlurUpsample
from trainer.schedule import lr_factor

CLASSES = {"BlurDownsample": "Downsample", "BlurUpsample": "Upsample", "Pad2d": "ReflectionPad2d"}  # ours: published


def generator_of(recording: Recording) -> ResnetGenerator:
    """The generator that a file `resnet<blocks>_<antialias|noantialias>` recorded, with its weights."""
    kind, antialias = recording.name.split("_")
    weights = recording.under("sd/")
    ngf, blocks = len(weights["model.1.weight"]), int(kind.removeprefix("resnet"))
    net = ResnetGenerator(ngf=ngf, blocks=blocks, antialias=antialias == "antialias").double()
    net.load_state_dict(weights)
    return net


def assert_same_architecture(net: ResnetGenerator | PatchDiscriminator, recording: Recording) -> None:
    classes: list[str] = []
    for before, layer in zip([None, *net.model], net.model, strict=False):
        name = type(layer).__name__
        if isinstance(layer, nn.Identity):  # the activation, which the norm before it computes
            assert isinstance(before, InstanceNorm2d)
            name = {0.0: "ReLU", 0.2: "LeakyReLU"}[before.slope]
        classes.append(CLASSES.get(name, name))
    assert [f"{i}:{name}" for i, name in enumerate(classes)] == recording.plain("module_names")
    assert list(net.state_dict()) == recording.plain("keys")


@each("resnet*_*.npz")
def test_generator(recording: Recording) -> None:
    net = generator_of(recording)
    assert_same_architecture(net, recording)
    assert [name for name, _ in net.named_parameters()] == recording.plain("param_keys")
    taps = recording.plain("layers")
    for case in recording.before("_out"):
        x = recording[f"{case}_x"].requires_grad_()
        y, features = net.forward_with_features(x, taps)
        assert_same(y, recording[f"{case}_out"])
        for tap, feature, encoded in zip(taps, features, net.encode(x, taps), strict=True):
            assert_same(feature, recording[f"{case}_feat{tap}"])
            assert_same(encoded, recording[f"{case}_feat{tap}"])
        weighted = (net(x) * recording[f"{case}_gradw"]).sum()
        grad_x, grad_first_conv = torch.autograd.grad(weighted, [x, net.get_parameter("model.1.weight")])
        assert_same(grad_x, recording[f"{case}_grad_x"])
        assert_same(grad_first_conv, recording[f"{case}_grad_first_conv"])


@each("nlayer_d_*.npz")
def test_discriminator(recording: Recording) -> None:
    weights = recording.under("sd/")
    antialias = recording.name.endswith("_antialias")
    net = PatchDiscriminator(ndf=len(weights["model.0.weight"]), antialias=antialias).double()
    assert_same_architecture(net, recording)
    net.load_state_dict(weights)
    x = recording["x"].requires_grad_()
    score = net(x)
    assert_same(score, recording["out"])
    assert_same(torch.autograd.grad((score * recording["gradw"]).sum(), x)[0], recording["grad_x"])


@each("init_stats*.npz")
def test_initialisation(recording: Recording) -> None:
    nets = [ResnetGenerator(), PatchDiscriminator()]
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == recording.plain("n_params")
    for net in nets:
        init_weights(net, torch.Generator().manual_seed(0))
    # The two networks' parameters follow each other in the recording, as they do here.
    parameters = [p.detach() for net in nets for p in net.parameters()]
    std, absmax = (
        np.concatenate([np.ravel(recording.arrays[key]) for key in recording.keys if kind in key])
        for kind in ("std", "absmax")
    )
    for parameter, spread, largest in zip(parameters, std, absmax, strict=True):
        if parameter.ndim == 1:  # a bias; D's last one is a single number, whose spread is recorded as not a number
            assert parameter.abs().max() == largest
        else:
            # Both are estimates from n draws, with a relative standard error of 1 / sqrt(2 n) each.
            error = 5 * 2**0.5 / (2 * parameter.numel()) ** 0.5
            assert parameter.std(correction=0) == pytest.approx(spread, rel=error)


@each("patchsamplef_*.npz")
def test_projection_heads(recording: Recording) -> None:
    # The two files share the inputs of the first. Its out_np0_* (no sampling, and normalised over the positions) are
    # left out: nothing in training uses that mode.
    inputs = recording.beside("patchsamplef_cut")
    count = len(inputs.under("feat"))
    features, ids = ([inputs[f"{kind}{i}"] for i in range(count)] for kind in ("feat", "ids"))
    channels = [feature.shape[1] for feature in features]
    rule = recording.name.split("_")[1]

    dim = len(inputs["mlp_0.0.bias"])
    heads = ProjectionHeads(channels, dim=dim, normalisation=rule).double()
    assert list(heads.state_dict()) == inputs.plain("state_dict_keys")
    heads.load_state_dict({f"mlp_{key}": value for key, value in inputs.under("mlp_").items()})
    bare = ProjectionHeads(channels, normalisation=rule, use_mlp=False)
    for i, (projected, sampled) in enumerate(zip(heads(features, ids), bare(features, ids), strict=True)):
        assert_same(projected, recording[f"out_mlp{i}"])
        assert_same(sampled, recording[f"out_nomlp{i}"])
    if "out_choice1" in recording:
        assert_same(heads([features[1]], [ids[1]], [1])[0], recording["out_choice1"])
    if "drawn_ids0" in recording:
        for i, projected in enumerate(heads(features, [recording[f"drawn_ids{i}"] for i in range(count)])):
            assert_same(projected, recording[f"drawn_out{i}"])


@each("blurpool*.npz")
def test_blur_resampling(recording: Recording) -> None:
    x = recording["x"]
    channels = x.shape[1]
    assert_same(BlurDownsample(channels).filt, recording["down_kernel"])
    assert_same(BlurUpsample(channels).filt, recording["up_kernel"])
    assert_same(BlurDownsample(channels, 3).double()(x), recording["down_filt3_stride2_reflect"])
    assert_same(BlurDownsample(channels, 4).double()(x), recording["down_filt4_stride2_reflect"])
    assert_same(BlurUpsample(channels, 3).double()(x), recording["up_filt3"])
    assert_same(BlurUpsample(channels, 4).double()(x), recording["up_filt4_stride2_repl"])


@each("ganloss*.npz")
@pytest.mark.parametrize("real", [True, False], ids=["real", "fake"])
@pytest.mark.parametrize("kind", ["lsgan", "vanilla", "wgangp", "nonsaturating"])
def test_adversarial_loss(recording: Recording, kind: str, real: bool) -> None:
    name = f"{kind}_{'real' if real else 'fake'}"
    score = recording["pred"].requires_grad_()
    loss = adversarial_loss(kind, score, real)
    assert_same(loss, recording[name].mean())
    assert_same(torch.autograd.grad(loss, score)[0], recording[f"{name}_grad"])
    if recording[name].ndim:  # recorded one for each image
        assert_same(torch.stack([adversarial_loss(kind, image, real) for image in score.split(1)]), recording[name])


@each("patchnce*.npz")
def test_patch_nce(recording: Recording) -> None:
    for size in recording.before("_B_S_C"):
        assert_same_patch_nce(recording, size)


def assert_same_patch_nce(recording: Recording, size: str) -> None:
    key = recording[f"{size}_k"].requires_grad_()
    images = recording.plain(f"{size}_B_S_C")[0]
    for name, groups in ("within", images), ("allneg", 1), ("bs1", 1):
        query = recording[f"{size}_q"].requires_grad_()
        loss = patch_nce(query, key, groups)
        assert_same(loss, recording[f"{size}_loss_{name}"])
        grad_query, grad_key = torch.autograd.grad(loss.mean(), [query, key], allow_unused=True)
        assert_same(grad_query, recording[f"{size}_gradq_{name}"])
        assert grad_key is None
    query = recording[f"{size}_q"]
    assert_same(patch_nce(query, key, images, temperature=0.5), recording[f"{size}_loss_within_T0.5"])
    # In float32 a loss near 0 is the difference of two logits near 1 / 0.07 = 14, so the tolerance is theirs.
    single = patch_nce(query.float(), key.float(), images)
    torch.testing.assert_close(single, recording[f"{size}_loss_within_f32"], rtol=1e-5, atol=1e-5)


@each("srunit_noise*.npz")
def test_perturbed_features(recording: Recording) -> None:
    net = generator_of(recording.beside("resnet9_antialias"))
    taps = recording.plain("layers")
    for case in recording.before(f"_l{taps[0]}_magnitude"):  # T0.1
        features = [recording[f"feat_in_{tap}"].requires_grad_() for tap in taps]
        perturbed = []
        for tap, feature in zip(taps, features, strict=True):
            draws = recording[f"normal_{tap}"], recording[f"uniform_{tap}"]
            tau, magnitude = perturbation(*draws, float(case.removeprefix("T")), rule="published")
            assert_same(magnitude, recording[f"{case}_l{tap}_magnitude"])
            assert_same(feature + tau, recording[f"{case}_l{tap}_feat_perturbed"])
            perturbed.append(feature + tau)
        outputs = net.perturbed_features(perturbed, taps)
        for tap, output in zip(taps, outputs, strict=True):
            assert_same(output, recording[f"{case}_l{tap}_feat_out"])
        weighted = [(o * recording[f"gradw_{tap}"]).sum() for tap, o in zip(taps, outputs, strict=True)]
        for tap, grad in zip(taps, torch.autograd.grad(torch.stack(weighted).sum(), features), strict=True):
            assert_same(grad, recording[f"{case}_l{tap}_grad_feat_in"])


@each("srunit_reg*.npz")
def test_robustness_loss(recording: Recording) -> None:
    for tag in recording.before("_choice"):
        assert_same_robustness(recording, tag)


def assert_same_robustness(recording: Recording, tag: str) -> None:
    real, perturbed = (recording[f"{tag}_feat_{kind}"].requires_grad_() for kind in ("real", "pert"))
    magnitude, ids, choice = recording[f"{tag}_magnitude"], recording[f"{tag}_ids"], recording.plain(f"{tag}_choice")
    weights = recording.under(f"{tag}_mlp.")
    dim = len(weights["0.bias"])
    heads = ProjectionHeads([real.shape[1]] * (choice + 1), dim=dim, normalisation="srunit").double()
    head = heads.get_submodule(f"mlp_{choice}")
    head.load_state_dict(weights)

    rows_real, rows_perturbed = heads([real, perturbed], [ids, ids], [choice, choice])
    loss = robustness_loss(rows_real, rows_perturbed, magnitude, ids) / recording.plain("n_nce_layers")
    assert_same(loss, recording[f"{tag}_loss"])
    assert_same(sample_patches(magnitude, ids).flatten(), recording[f"{tag}_mag_at_ids"])
    one, first = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.tensor([0])
    distances = [
        robustness_loss(a, b, one, first) for a, b in zip(rows_real.split(1), rows_perturbed.split(1), strict=True)
    ]
    assert_same(torch.stack(distances), recording[f"{tag}_dist"])

    names, parameters = zip(*head.named_parameters(), strict=True)
    grad_real, grad_perturbed, *grads = torch.autograd.grad(loss, [real, perturbed, *parameters])
    assert_same(grad_real, recording[f"{tag}_grad_real"])
    assert_same(grad_perturbed, recording[f"{tag}_grad_pert"])
    for name, grad in zip(names, grads, strict=True):
        assert_same(grad, recording[f"{tag}_grad_mlp.{name}"])


@each("imagepool*.npz")
def test_image_buffer(recording: Recording) -> None:
    for tag in recording.before("_pool_size"):
        buffer = ImageBuffers("buffer", recording.plain(f"{tag}_pool_size"), 1)
        columns = (recording.plain(f"{tag}_{column}") for column in ("in_id", "out_id", "uniform", "randint"))
        for given, expected, uniform, index in zip(*columns, strict=True):
            image, draws = torch.full((1, 1, 2, 2), given), (torch.tensor([each]) for each in (uniform, index))
            shown = buffer.exchange(image, torch.tensor([0]), *draws) if buffer.capacity else image
            assert shown.unique().item() == expected
        kept = buffer.state().get("buffer/0", torch.empty(0, 1, 1, 1))
        assert kept[:, 0, 0, 0].tolist() == recording.plain(f"{tag}_final")


@each("lr_schedule*.npz")
def test_schedule(recording: Recording) -> None:
    for tag in recording.before("_epoch"):
        name, n_epochs, n_epochs_decay = tag.split("_")[:3]
        kind = {"step": "step", "cosine": "cosine-published"}.get(name, "linear")
        epochs = recording.plain(f"{tag}_epoch")
        rates = [
            2e-4 * lr_factor(kind, epoch, int(n_epochs), int(n_epochs_decay), step_epochs=6)
            for epoch in [*epochs, epochs[-1] + 1]
        ]
        recorded = torch.cat([recording[f"{tag}_lr"], recording[f"{tag}_after_last"].reshape(1)])
        assert_same(torch.tensor(rates, dtype=torch.float64), recorded)


@each("baselines_lr_schedule*.npz")
def test_schedules_of_baselines(recording: Recording) -> None:
    """CycleGAN's and GcGAN's code is an epoch ahead of ours, so that its last one has the rate 0. DistanceGAN's falls from an
    epoch later on, and in as many steps as epochs are left."""
    for tag in recording.before("_epoch"):
        name, *counts = tag.split("_")
        n_epochs, n_epochs_decay, _ = map(int, counts)
        ahead, n_epochs, n_epochs_decay = (
            (0, n_epochs + 1, n_epochs_decay - 1) if name == "distancegan" else (1, n_epochs, n_epochs_decay)
        )
        rates = [
            2e-4 * lr_factor("linear", epoch + ahead, n_epochs, n_epochs_decay)
            for epoch in recording.plain(f"{tag}_epoch")
        ]
        assert_same(torch.tensor(rates, dtype=torch.float64), recording[f"{tag}_lr"])


@each("transforms*.npz")
def test_image_transforms(recording: Recording) -> None:
    image = Image.fromarray(recording.arrays["image_hwc_uint8"])
    large = resize(image, (44, 44)).crop((5, 9, 37, 41))
    wide = resize(image, (44, int(44 * image.height / image.width)))
    cases = {
        "resize44_crop32_at_x5_y9_flip0": large,
        "resize44_crop32_at_x5_y9_flip1": large.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "resize32_crop32_noflip": resize(image, (32, 32)),
        "none_make_multiple_of_4": multiple_of(image, 4),
        "scale_width44_crop28_at_x3_y1": wide.crop((3, 1, 31, 29)),
    }
    for name, transformed in cases.items():
        difference = np.abs(to_array(transformed) - recording.arrays[name])
        # One grey level for a Pillow that rounds otherwise; nearly all pixels are equal.
        assert difference.max() <= 1.001 / 127.5, name
        assert difference.mean() < 1e-3, name


@each("sincut_patches*.npz")
def test_tiles_of_a_zoomed_image(recording: Recording) -> None:
    """The published cell is number patch_index of the grid, counted down its columns."""
    image = Image.fromarray(recording.arrays["image_hwc_uint8"])
    side, file = recording.plain("crop_size"), encode(image, "png")
    decoder = PillowDecoder((side, side), torch.device("cpu"), 1)
    names = ("patch_index", "start_x", "start_y", "flip", "factor_w", "factor_h")
    for i, (number, start_x, start_y, flip, *factors) in enumerate(zip(*map(recording.plain, names), strict=True)):
        zoomed = zoomed_size(image.size, factors, (side, side))
        assert list(zoomed) == recording.plain(f"zoomed{i}_size_wh")
        columns, rows = zoomed[0] // side, zoomed[1] // side
        column, row = divmod(number % (columns * rows), rows)
        tile = EncodedCrop(file, start_x + column * side, start_y + row * side, flip, "image", zoomed)
        pixels = (decoder.decode([tile])[0].permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(pixels - recording.arrays[f"out{i}"]).max() <= 1.001  # grey levels, as above
    decoder.close()
