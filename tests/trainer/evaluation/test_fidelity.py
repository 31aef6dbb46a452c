"""FID and KID: closed forms, an independent library, and the same bits for any number of parts in any order."""

import pickle
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from trainer.evaluation import Example
from trainer.evaluation.fidelity import Features, fid, fidelity, kid


def normal(count: int, width: int, seed: int) -> np.ndarray:
    """Correlated features with a mean."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, width)) @ generator.normal(size=(width, width)) + generator.normal(size=width)


def on_axes(*deviations: float) -> np.ndarray:
    """Points on the axes, of mean 0 and of exactly these standard deviations, uncorrelated."""
    axes = np.diag(deviations) * np.sqrt((2 * len(deviations) - 1) / 2)
    return np.concatenate([axes, -axes])


class Small(nn.Module):
    """A seeded extractor that also keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 13, stride=13)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.conv(x).relu().mean(dim=(2, 3))


def pictures(count: int, seed: int, size: tuple[int, int] = (24, 32)) -> np.ndarray:
    """Noise around a colour of each picture's own."""
    generator = np.random.default_rng(seed)
    colours = generator.integers(0, 200, (count, 1, 1, 3))
    return (colours + generator.integers(0, 56, (count, *size, 3))).astype(np.uint8)


def test_fid_of_equal_sets_is_zero() -> None:
    for count in (2, 10, 300):
        assert fid(normal(count, 40, 0), normal(count, 40, 0)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [5, 200], ids=["singular covariance", "regular covariance"])
def test_fid_of_a_shift_is_its_squared_length(count: int) -> None:
    features, shift = normal(count, 30, 1), np.random.default_rng(2).normal(size=30)
    assert fid(features, features + shift) == pytest.approx(shift @ shift, rel=1e-9)


def test_fid_of_uncorrelated_features() -> None:
    """Of diagonal covariances it is the squared distance of the standard deviations; some of them are 0 here."""
    assert fid(on_axes(1, 2, 0), on_axes(3, 1, 0)) == pytest.approx((3 - 1) ** 2 + (2 - 1) ** 2, rel=1e-12)
    assert fid(on_axes(1, 0, 0), on_axes(0, 0, 2)) == pytest.approx(1 + 4, rel=1e-12)


def test_fid_of_covariances_that_do_not_commute() -> None:
    """For 2x2 matrices Tr √P = √(Tr P + 2 √det P)."""
    a, b = normal(9, 2, 3), normal(7, 2, 4)
    product = np.cov(a.T) @ np.cov(b.T)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T))
    expected -= 2 * np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    assert fid(a, b) == pytest.approx(expected, rel=1e-10)


class Through(nn.Identity):
    num_features = 50


@pytest.mark.parametrize(("count", "tolerance"), [(400, 1e-9), (20, 1e-5)], ids=["many", "fewer than features"])
def test_fid_as_torchmetrics(count: int, tolerance: float) -> None:
    """Which takes roots of eigenvalues that should be 0 where images are few."""
    a, b = normal(count, 50, 5), normal(count + 3, 50, 6)
    reference = FrechetInceptionDistance(feature=Through()).set_dtype(torch.float64)
    reference.update(torch.from_numpy(a), real=False)
    reference.update(torch.from_numpy(b), real=True)
    assert fid(a, b) == pytest.approx(float(reference.compute()), rel=tolerance)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kid_as_torchmetrics() -> None:
    a, b = normal(40, 30, 7), normal(40, 30, 8)
    reference = KernelInceptionDistance(feature=nn.Identity(), subsets=1, subset_size=40)
    reference.update(torch.from_numpy(a), real=False)
    reference.update(torch.from_numpy(b), real=True)
    assert kid(a, b) == pytest.approx(float(reference.compute()[0]), rel=1e-9)


def test_kid_by_hand() -> None:
    """d = 1, features {0, 1} and {1, 2, 3}: the kernel is (xy + 1)³."""
    within_a, within_b = 1, (27 + 64 + 343) / 3
    between = (1 + 1 + 1 + 8 + 27 + 64) / 6
    value = kid(np.array([[0.0], [1.0]]), np.array([[1.0], [2.0], [3.0]]))
    assert value == pytest.approx(within_a + within_b - 2 * between, rel=1e-12)


def test_fid_is_biased_for_few_images_and_kid_is_not() -> None:
    """Over draws from one distribution, where both should be 0."""
    draws = np.random.default_rng(9).normal(size=(200, 2, 10, 20))
    fids, kids = (np.array([measure(a, b) for a, b in draws]) for measure in (fid, kid))
    assert fids.min() > 5
    assert abs(kids.mean()) < 3 * kids.std() / np.sqrt(len(kids))
    assert kids.min() < 0 < kids.max()


def test_images_reach_the_network_as_in_the_cut_supplement() -> None:
    """Three times too large: the corners are not aligned and nothing is averaged, so each third pixel remains."""
    network = Small()
    features = Features(network)
    (picture,) = pictures(1, 0, (3 * 299, 3 * 299))
    features.update(Example(0, picture))
    (x,) = network.seen
    assert x.shape == (1, 3, 299, 299) and x.dtype == torch.float32
    expected = torch.from_numpy(picture[1::3, 1::3]).permute(2, 0, 1).double() / 127.5 - 1
    assert torch.allclose(x[0].double(), expected, atol=1e-6)
    assert features.by_index[0].shape == (6,)


def features_of(network: nn.Module, images: np.ndarray, indices: Iterable[int] | None = None) -> Features:
    """Of some of the images, in the given order; of all by default."""
    features = Features(network)
    for i in range(len(images)) if indices is None else indices:
        features.update(Example(i, images[i]))
    return features


@pytest.mark.parametrize(
    "shares", [[[4, 8, 0, 3, 1, 7, 2, 6, 5]], [[0, 3, 6], [1, 4, 7], [2, 5, 8]], [[8, 7], range(7)]]
)
def test_the_same_bits_for_any_parts_and_order(shares: list[Iterable[int]]) -> None:
    """The parts come from other processes."""
    network, images = Small(), pictures(9, 1)
    real = features_of(network, pictures(7, 2, (30, 20)))
    first, *others = (features_of(network, images, share) for share in shares)
    for other in others:
        first.merge(pickle.loads(pickle.dumps(other)))
    expected = fidelity(features_of(network, images), real)
    assert fidelity(first, real) == expected
    distance, _ = figures = list(expected.values())
    assert all(isinstance(figure, float) for figure in figures) and isinstance(distance, float) and distance > 0


def test_an_image_of_two_parts_counts_once() -> None:
    network, images = Small(), pictures(4, 3)
    features = features_of(network, images, [0, 1, 2])
    features.merge(features_of(network, images, [2, 3]))
    assert np.array_equal(features.array(), features_of(network, images).array())


def test_sent_to_another_process_without_the_network() -> None:
    assert len(pickle.dumps(Features(nn.Linear(1000, 1000)))) < 1000


def test_no_weights_no_figures() -> None:
    features = Features(None)
    for i, picture in enumerate(pictures(3, 4)):
        features.update(Example(i, picture))
    reason = "not available: no Inception weights were given (--inception FILE)"
    assert fidelity(features, features) == {"FID": reason, "KID": reason}


def test_too_few_images() -> None:
    network = Small()
    metrics = fidelity(features_of(network, pictures(3, 5)), features_of(network, pictures(1, 6)))
    reason = "not available: there are 3 images and 1 real ones, of each it takes 2"
    assert metrics == {"FID": reason, "KID": reason}
