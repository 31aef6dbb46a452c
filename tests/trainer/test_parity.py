"""Replay of recorded numbers: what the published CUT and SRUNIT code computes, this code computes, in float64.

The recordings are no part of the repository. They are looked for in the folder named by the environment variable
ORACLES (default ../shared/oracles beside the repository); every file of each kind that is there is replayed.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from infra.config import build
from launch.config import JobConfig
from pipelines.images import multiple_of, resize, to_array
from tests.trainer.published_passes import PublishedPasses, stock_norm_is_wrong, unmend
from trainer.draws import Draws
from trainer.engines import EngineConfig, make_engine
from trainer.image_buffer import ImageBuffer
from trainer.losses import adversarial_loss, patch_nce, perturbation, robustness_loss
from trainer.methods import METHODS
from trainer.methods.base import StepContext
from trainer.methods.config import PAPER_TAPS
from trainer.networks import PatchDiscriminator, ProjectionHeads, ResnetGenerator, init_weights
from trainer.networks.heads import sample_patches
from trainer.networks.norm import InstanceNorm2d
from trainer.networks.resample import BlurDownsample, BlurUpsample
from trainer.schedule import lr_factor
from trainer.step import train_step

ORACLES = Path(os.environ.get("ORACLES", Path(__file__).parents[3] / "shared" / "oracles"))
CLASSES = {"BlurDownsample": "Downsample", "BlurUpsample": "Upsample", "Pad2d": "ReflectionPad2d"}  # ours: published


class Oracle:
    """One file of recorded arrays; floats stay float64, names that are not there raise KeyError."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.arrays = np.load(path)

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def plain(self, key: str) -> Any:
        """As a Python number, string or list of them."""
        return self.arrays[key].tolist()

    def weights(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): self[key] for key in self.arrays.files if key.startswith(prefix)}


def each(pattern: str) -> pytest.MarkDecorator:
    """Run a test once for every file of a kind, as its argument `oracle`."""
    paths = sorted(ORACLES.glob(pattern))
    missing = pytest.param(None, marks=pytest.mark.skip(f"no {pattern} in {ORACLES}"), id="absent")
    return pytest.mark.parametrize("oracle", [pytest.param(p, id=p.stem) for p in paths] or [missing], indirect=True)


@pytest.fixture
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return Oracle(request.param)


@pytest.fixture
def oracles() -> Path:
    """The folder of recordings, for a test that needs a file beside its own."""
    return ORACLES


def assert_same(actual: Tensor | float, expected: Tensor | float, tolerance: float = 1e-10) -> None:
    """Equal to `tolerance`, relative to the largest expected value."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)


def generator_of(oracle: Oracle) -> ResnetGenerator:
    """The generator that a file `resnet<blocks>_<antialias|noantialias>` recorded, with its weights."""
    kind, antialias = oracle.name.split("_")
    net = ResnetGenerator(ngf=8, blocks=int(kind.removeprefix("resnet")), antialias=antialias == "antialias").double()
    net.load_state_dict(oracle.weights("sd/"))
    return net


def assert_same_architecture(net: nn.Module, oracle: Oracle) -> None:
    classes: list[str] = []
    for before, layer in zip([None, *net.model], net.model, strict=False):
        name = type(layer).__name__
        if isinstance(layer, nn.Identity):  # the activation, which the norm before it computes
            assert isinstance(before, InstanceNorm2d)
            name = {0.0: "ReLU", 0.2: "LeakyReLU"}[before.slope]
        classes.append(CLASSES.get(name, name))
    assert [f"{i}:{name}" for i, name in enumerate(classes)] == oracle.plain("module_names")
    assert list(net.state_dict()) == oracle.plain("keys")


@each("resnet*_*.npz")
def test_generator(oracle: Oracle) -> None:
    net = generator_of(oracle)
    assert_same_architecture(net, oracle)
    assert [name for name, _ in net.named_parameters()] == oracle.plain("param_keys")
    taps = oracle.plain("layers")
    for case in "a", "b":
        x = oracle[f"{case}_x"].requires_grad_()
        y, features = net.forward_with_features(x, taps)
        assert_same(y, oracle[f"{case}_out"])
        for tap, feature, encoded in zip(taps, features, net.encode(x, taps), strict=True):
            assert_same(feature, oracle[f"{case}_feat{tap}"])
            assert_same(encoded, oracle[f"{case}_feat{tap}"])
        weighted = (net(x) * oracle[f"{case}_gradw"]).sum()
        grad_x, grad_first_conv = torch.autograd.grad(weighted, [x, net.model[1].weight])
        assert_same(grad_x, oracle[f"{case}_grad_x"])
        assert_same(grad_first_conv, oracle[f"{case}_grad_first_conv"])


@each("nlayer_d_*.npz")
def test_discriminator(oracle: Oracle) -> None:
    net = PatchDiscriminator(ndf=8, antialias=oracle.name.endswith("_antialias")).double()
    assert_same_architecture(net, oracle)
    net.load_state_dict(oracle.weights("sd/"))
    x = oracle["x"].requires_grad_()
    score = net(x)
    assert_same(score, oracle["out"])
    assert_same(torch.autograd.grad((score * oracle["gradw"]).sum(), x)[0], oracle["grad_x"])


@each("init_stats*.npz")
def test_initialisation(oracle: Oracle) -> None:
    nets = [ResnetGenerator(), PatchDiscriminator()]
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == oracle.plain("n_params")
    for net in nets:
        init_weights(net, torch.Generator().manual_seed(0))
    # The two networks' parameters follow each other in the recording, as they do here.
    parameters = [p.detach() for net in nets for p in net.parameters()]
    expected = np.concatenate([np.ravel(oracle.arrays[key]) for key in oracle.arrays.files if "std" in key])
    for parameter, std in zip(parameters, expected, strict=True):
        # Both are estimates from n draws, with a relative standard error of 1 / sqrt(2 n) each.
        error = 5 * 2**0.5 / (2 * parameter.numel()) ** 0.5
        assert parameter.std(correction=0) == pytest.approx(std, rel=error, abs=1e-12)


@each("patchsamplef_*.npz")
def test_projection_heads(oracle: Oracle, oracles: Path) -> None:
    # The two files share the inputs of the first. Its out_np0_* (no sampling, and normalised over the positions) are
    # left out: nothing in training uses that mode.
    inputs = Oracle(oracles / "patchsamplef_cut.npz")
    features, ids = ([inputs[f"{kind}{i}"] for i in range(3)] for kind in ("feat", "ids"))
    channels = [feature.shape[1] for feature in features]
    rule = oracle.name.split("_")[1]

    heads = ProjectionHeads(channels, dim=16, normalisation=rule).double()
    assert list(heads.state_dict()) == inputs.plain("state_dict_keys")
    heads.load_state_dict({f"mlp_{key}": value for key, value in inputs.weights("mlp_").items()})
    bare = ProjectionHeads(channels, normalisation=rule, use_mlp=False)
    for i, (projected, sampled) in enumerate(zip(heads(features, ids), bare(features, ids), strict=True)):
        assert_same(projected, oracle[f"out_mlp{i}"])
        assert_same(sampled, oracle[f"out_nomlp{i}"])
    if "out_choice1" in oracle.arrays:
        assert_same(heads([features[1]], [ids[1]], [1])[0], oracle["out_choice1"])
    if "drawn_ids0" in oracle.arrays:
        for i, projected in enumerate(heads(features, [oracle[f"drawn_ids{i}"] for i in range(3)])):
            assert_same(projected, oracle[f"drawn_out{i}"])


@each("blurpool*.npz")
def test_blur_resampling(oracle: Oracle) -> None:
    x = oracle["x"]
    channels = x.shape[1]
    assert_same(BlurDownsample(channels).filt, oracle["down_kernel"])
    assert_same(BlurUpsample(channels).filt, oracle["up_kernel"])
    assert_same(BlurDownsample(channels, 3).double()(x), oracle["down_filt3_stride2_reflect"])
    assert_same(BlurDownsample(channels, 4).double()(x), oracle["down_filt4_stride2_reflect"])
    assert_same(BlurUpsample(channels, 3).double()(x), oracle["up_filt3"])
    assert_same(BlurUpsample(channels, 4).double()(x), oracle["up_filt4_stride2_repl"])


@each("ganloss*.npz")
@pytest.mark.parametrize("real", [True, False], ids=["real", "fake"])
@pytest.mark.parametrize("kind", ["lsgan", "vanilla", "wgangp", "nonsaturating"])
def test_adversarial_loss(oracle: Oracle, kind: str, real: bool) -> None:
    name = f"{kind}_{'real' if real else 'fake'}"
    score = oracle["pred"].requires_grad_()
    loss = adversarial_loss(kind, score, real)
    assert_same(loss, oracle[name].mean())
    assert_same(torch.autograd.grad(loss, score)[0], oracle[f"{name}_grad"])
    if oracle[name].ndim:  # recorded one for each image
        assert_same(torch.stack([adversarial_loss(kind, image, real) for image in score.split(1)]), oracle[name])


@each("patchnce*.npz")
@pytest.mark.parametrize("size", ["small", "big"])
def test_patch_nce(oracle: Oracle, size: str) -> None:
    key = oracle[f"{size}_k"].requires_grad_()
    images = oracle.plain(f"{size}_B_S_C")[0]
    for name, groups in ("within", images), ("allneg", 1), ("bs1", 1):
        query = oracle[f"{size}_q"].requires_grad_()
        loss = patch_nce(query, key, groups)
        assert_same(loss, oracle[f"{size}_loss_{name}"])
        grad_query, grad_key = torch.autograd.grad(loss.mean(), [query, key], allow_unused=True)
        assert_same(grad_query, oracle[f"{size}_gradq_{name}"])
        assert grad_key is None
    query = oracle[f"{size}_q"]
    assert_same(patch_nce(query, key, images, temperature=0.5), oracle[f"{size}_loss_within_T0.5"])
    # In float32 a loss near 0 is the difference of two logits near 1 / 0.07 = 14, so the tolerance is theirs.
    single = patch_nce(query.float(), key.float(), images)
    torch.testing.assert_close(single, oracle[f"{size}_loss_within_f32"], rtol=1e-5, atol=1e-5)


@each("srunit_noise*.npz")
@pytest.mark.parametrize("max_norm", [0.001, 0.1])
def test_perturbed_features(oracle: Oracle, oracles: Path, max_norm: float) -> None:
    net = generator_of(Oracle(oracles / "resnet9_antialias.npz"))
    taps = oracle.plain("layers")
    features = [oracle[f"feat_in_{tap}"].requires_grad_() for tap in taps]
    perturbed = []
    for tap, feature in zip(taps, features, strict=True):
        tau, magnitude = perturbation(oracle[f"normal_{tap}"], oracle[f"uniform_{tap}"], max_norm, rule="published")
        assert_same(magnitude, oracle[f"T{max_norm}_l{tap}_magnitude"])
        assert_same(feature + tau, oracle[f"T{max_norm}_l{tap}_feat_perturbed"])
        perturbed.append(feature + tau)
    outputs = net.perturbed_features(perturbed, taps)
    for tap, output in zip(taps, outputs, strict=True):
        assert_same(output, oracle[f"T{max_norm}_l{tap}_feat_out"])
    weighted = torch.stack([(o * oracle[f"gradw_{tap}"]).sum() for tap, o in zip(taps, outputs, strict=True)]).sum()
    for tap, grad in zip(taps, torch.autograd.grad(weighted, features), strict=True):
        assert_same(grad, oracle[f"T{max_norm}_l{tap}_grad_feat_in"])


@each("srunit_reg*.npz")
@pytest.mark.parametrize("tag", ["b1_choice1", "b2_choice2"])
def test_robustness_loss(oracle: Oracle, tag: str) -> None:
    real, perturbed = (oracle[f"{tag}_feat_{kind}"].requires_grad_() for kind in ("real", "pert"))
    magnitude, ids, choice = oracle[f"{tag}_magnitude"], oracle[f"{tag}_ids"], oracle.plain(f"{tag}_choice")
    heads = ProjectionHeads([real.shape[1]] * (choice + 1), dim=16, normalisation="srunit").double()
    head = heads.get_submodule(f"mlp_{choice}")
    head.load_state_dict(oracle.weights(f"{tag}_mlp."))

    rows_real, rows_perturbed = heads([real, perturbed], [ids, ids], [choice, choice])
    loss = robustness_loss(rows_real, rows_perturbed, magnitude, ids) / oracle.plain("n_nce_layers")
    assert_same(loss, oracle[f"{tag}_loss"])
    assert_same(sample_patches(magnitude, ids).flatten(), oracle[f"{tag}_mag_at_ids"])
    one, first = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.tensor([0])
    distances = [
        robustness_loss(a, b, one, first) for a, b in zip(rows_real.split(1), rows_perturbed.split(1), strict=True)
    ]
    assert_same(torch.stack(distances), oracle[f"{tag}_dist"])

    names, weights = zip(*head.named_parameters(), strict=True)
    grad_real, grad_perturbed, *grads = torch.autograd.grad(loss, [real, perturbed, *weights])
    assert_same(grad_real, oracle[f"{tag}_grad_real"])
    assert_same(grad_perturbed, oracle[f"{tag}_grad_pert"])
    for name, grad in zip(names, grads, strict=True):
        assert_same(grad, oracle[f"{tag}_grad_mlp.{name}"])


@each("imagepool*.npz")
@pytest.mark.parametrize("tag", ["p5", "p50", "p5_batch3"])
def test_image_buffer(oracle: Oracle, tag: str) -> None:
    buffer = ImageBuffer(oracle.plain(f"{tag}_pool_size"))
    columns = (oracle.plain(f"{tag}_{column}") for column in ("in_id", "out_id", "uniform", "randint"))
    for given, expected, uniform, index in zip(*columns, strict=True):
        assert buffer.query(torch.full((1, 2, 2), given), uniform, index).unique().item() == expected
    assert buffer.state_dict()["images"][:, 0, 0, 0].tolist() == oracle.plain(f"{tag}_final")


@each("lr_schedule*.npz")
def test_schedule(oracle: Oracle) -> None:
    tags = [key.removesuffix("_epoch") for key in oracle.arrays.files if key.endswith("_epoch")]
    assert tags
    for tag in tags:
        name, n_epochs, n_epochs_decay = tag.split("_")[:3]
        kind = {"step": "step", "cosine": "cosine-published"}.get(name, "linear")
        epochs = oracle.plain(f"{tag}_epoch")
        rates = [
            2e-4 * lr_factor(kind, epoch, int(n_epochs), int(n_epochs_decay), step_epochs=6)
            for epoch in [*epochs, epochs[-1] + 1]
        ]
        recorded = torch.cat([oracle[f"{tag}_lr"], oracle[f"{tag}_after_last"].reshape(1)])
        assert_same(torch.tensor(rates, dtype=torch.float64), recorded)


@each("transforms*.npz")
def test_image_transforms(oracle: Oracle) -> None:
    image = Image.fromarray(oracle.arrays["image_hwc_uint8"])
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
        difference = np.abs(to_array(transformed) - oracle.arrays[name])
        # One grey level for a Pillow that rounds otherwise; nearly all pixels are equal.
        assert difference.max() <= 1.001 / 127.5, name
        assert difference.mean() < 1e-3, name


@dataclass(frozen=True)
class RecordedDraws(Draws):
    """The draws that the published code made in one training step, in place of our own."""

    oracle: Oracle

    def recorded(self, name: str) -> Tensor:
        return self.oracle[f"s{self.step}_{name}"]

    def patch_ids(self, stream: str, tap: int, positions: int, count: int) -> Tensor:
        place = 10 if stream == "robust" else 5 * (stream == "identity") + PAPER_TAPS.index(tap)
        return self.recorded(f"ids{place}")

    def coin(self, stream: str) -> bool:
        return bool(self.recorded("flipdraw0") < 0.5)

    def choice(self, stream: str, count: int) -> int:
        return int(self.recorded("choice0"))

    def noise(self, tap: int, slots: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.recorded("normal0"), self.recorded("uniform0")


@dataclass(frozen=True)
class Pair:
    source: Tensor
    target: Tensor

    @property
    def slots(self) -> Tensor:
        return torch.arange(len(self.source))


def trace_options(words: list[str]) -> dict[str, Any]:
    """Our options for the published code's command line."""
    values = [*words[1:], "--"]  # an option without a value is a switch
    given = {w: "True" if v.startswith("--") else v for w, v in zip(words, values, strict=True) if w.startswith("--")}
    fast = given.get("--CUT_mode") == "FastCUT"
    return METHODS["fastcut" if fast else given["--model"]] | {
        "method.patches": 16, "method.buffer": 0, "model.ngf": 8, "model.ndf": 8, "model.head_dim": 16,
        "method.all_negatives": given.get("--nce_includes_all_negatives_from_minibatch", "False").lower() == "true",
        "method.robust.beta": float(given.get("--reg", 1e-3)) if given["--model"] == "srunit" else 0.0,
        "method.robust.T": float(given.get("--reg_noise", 1e-3)), "method.robust.start": 0.0,
        "method.robust.per_step": "one", "method.robust.rule": "published",
        "method.robust.gradient": "generator" if given.get("--reg_type") == "v1" else "both",
    }  # fmt: skip


@each("trace_[!i]*.npz")  # all but trace_init
def test_training_steps(oracle: Oracle, oracles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "inactive" in oracle.name:
        pytest.skip("a fault of the published code (only D is updated while L_robust is off) that is not copied")
    if not stock_norm_is_wrong():
        pytest.skip("recorded with a fault of torch 2.13's instance norm that this torch does not have")
    unmend(monkeypatch)
    words = str(oracle.plain("options")).split()
    config = build(JobConfig, trace_options(words))
    sources, targets = oracle["real_A"], oracle["real_B"]

    layout = {"memory_format": "contiguous"}  # as the recordings have it, since the fault depends on it
    engine = make_engine(EngineConfig(kind="single", device="cpu", precision="fp32", **layout))
    method = PublishedPasses(config.method, config.model, seed=0, global_batch=sources.shape[1]).double()
    start = Oracle(oracles / "trace_init.npz")
    networks = {"G": method.generator, "D": method.discriminator, "F": method.heads}
    for letter, network in networks.items():
        network.load_state_dict(start.weights(f"{letter}/"))
    engine.prepare(method, config.optim)

    for step, (source, target) in enumerate(zip(sources, targets, strict=True)):
        context = StepContext(RecordedDraws(0, step, oracle))
        with torch.no_grad():
            fake = method(Pair(source, target), context).fake
        assert_same(fake, oracle[f"s{step}_fake_B"], 1e-9)
        losses = train_step(method, engine, [Pair(source, target)], context)
        recorded = oracle.weights(f"s{step}_loss_")
        if config.method.robust.beta == 0:
            recorded.pop("reg", None)
        for name, value in recorded.items():
            assert_same(losses["robust" if name == "reg" else name], value, 1e-9)

    for letter, network in networks.items():
        for name, value in oracle.weights(f"final/{letter}/").items():
            torch.testing.assert_close(network.state_dict()[name], value, rtol=0, atol=1e-7)
