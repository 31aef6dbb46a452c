"""What methods want of the images: where each view cuts, the same for any ranks and restarts, and what a step gets of it."""

import dataclasses
import importlib.util
import itertools
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from infra.errors import UserError
from infra.storage import LocalStorage
from infra.views import SINGLE_CROP, Crop, CropWithBox, LabelledCrop, Tiles, View
from pipelines import decode
from pipelines.config import DataConfig
from pipelines.cuts import Cut, Cuts, augmentation, zoomed_size
from pipelines.dataset import ImageDataset
from pipelines.loader import Loader
from pipelines.manifest import DOMAINS, MANIFEST
from tests.pipelines.shardmaker import break_samples, write_root, write_split
from trainer.draws import Draws
from trainer.engines import Engine, EngineConfig
from trainer.methods.base import Losses, Method, OptimiserSpec, Phase, StepContext
from trainer.optim import OptimConfig
from trainer.step import train_step

CPU = torch.device("cpu")
has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
kinds = pytest.mark.parametrize(
    "kind", ["pillow", pytest.param("dali", marks=pytest.mark.skipif(not has_dali, reason="DALI is not installed"))]
)
CONFIG = DataConfig(crop=8, threads=1, window=2, decoder="pillow", prefetch=2)
TILES, BOX = Tiles(zoom=1 / 3, epoch=100), CropWithBox(side=4, grid=2)
WITH_LABELS = Crop(source_labels=True)
VIEWS: dict[str, View] = {
    "crop": SINGLE_CROP, "box": BOX, "tiles": TILES, "labelled": LabelledCrop(domain="target"), "source labels": WITH_LABELS,
    "box, source labels": CropWithBox(side=4, source_labels=True),
}  # fmt: skip
views = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


def cuts_of(view: View, image_size: tuple[int, int] = (110, 75), crop: int = 16, **options: Any) -> Cuts:
    given: dict[str, Any] = {"seed": 3, "domain": "source", "global_batch": 100, "flip": True} | options
    return Cuts(view, image_size=image_size, crop=(crop, crop), **given)


def zoomed_of(cut: Cut) -> tuple[int, int]:
    assert cut.zoomed
    return cut.zoomed


# ---- where a view cuts ------------------------------------------------------------------------------------------------


def test_the_tiles_of_a_step_lie_in_one_zoomed_image_and_none_overlaps_another_while_there_are_enough() -> None:
    cuts = cuts_of(TILES)
    for step in range(50):
        tiles = [cuts(100 * step + slot) for slot in range(100)]
        ((width, height),) = {zoomed_of(tile) for tile in tiles}
        assert all(0 <= tile.x <= width - 16 and 0 <= tile.y <= height - 16 for tile in tiles)
        there_are = (width // 16) * (height // 16)
        corners = [(tile.x, tile.y) for tile in tiles]
        for begin in range(0, 100, there_are):  # all of them are used before one comes again
            for (x, y), (other_x, other_y) in itertools.combinations(corners[begin : begin + there_are], 2):
                assert abs(x - other_x) >= 16 or abs(y - other_y) >= 16
        assert len(set(corners)) == min(there_are, 100)


def test_tiles_come_in_another_order_on_another_grid_in_each_step_turn_and_domain() -> None:
    """Of an image that is not zoomed, with 2 x 2 cells and 3 pixels to spare."""
    whole = Tiles(zoom=1.0, epoch=1)

    def drawn(domain: str, positions: range) -> tuple[tuple[int, int], tuple[tuple[int, int], ...]]:
        """The corner of the grid, and the cells in the order of the positions."""
        tiles = [cuts_of(whole, (35, 35), domain=domain)(position) for position in positions]
        corner = min(tile.x for tile in tiles), min(tile.y for tile in tiles)
        return corner, tuple((tile.x - corner[0], tile.y - corner[1]) for tile in tiles)

    steps = [drawn("source", range(100 * step, 100 * step + 4)) for step in range(800)]
    for found, possible in zip(map(Counter, zip(*steps, strict=True)), (16, 24), strict=True):  # corners, orders
        assert len(found) == possible
        assert max(abs(count - 800 / possible) for count in found.values()) < 4.5 * np.sqrt(800 / possible)
    turns = [drawn("source", range(4 * turn, 4 * turn + 4)) for turn in range(25)]
    assert len({corner for corner, _ in turns}) == 1 and len({order for _, order in turns}) > 10
    assert [drawn("target", range(100 * step, 100 * step + 4)) for step in range(5)] != steps[:5]


def test_width_and_height_are_zoomed_by_factors_of_their_own_between_the_least_and_1() -> None:
    cuts = cuts_of(TILES, (1200, 900), 64)
    sizes = np.array([zoomed_of(cuts(100 * step)) for step in range(2000)])
    for side, whole in zip(sizes.T, (1200, 900), strict=True):
        factors = side / whole
        assert 1 / 3 <= factors.min() < 0.335 and 0.998 < factors.max() <= 1
        assert abs(factors.mean() - 2 / 3) < 4.5 * 0.1925 / np.sqrt(2000) and abs(factors.std() - 0.1925) < 0.01
    assert abs(np.corrcoef(sizes.T)[0, 1]) < 4.5 / np.sqrt(2000)
    assert zoomed_of(cuts_of(TILES, (1200, 900), 64, domain="target")(0)) != tuple(sizes[0])


def test_a_zoomed_image_is_never_smaller_than_a_tile() -> None:
    assert zoomed_size((75, 110), (0.1, 0.5), (16, 16)) == (16, 55)
    cuts = cuts_of(TILES, (20, 110))
    assert {zoomed_of(cuts(100 * step))[0] for step in range(50)} == {16, 17, 18, 19, 20}


@pytest.mark.parametrize("view", [TILES, BOX], ids=["tiles", "box"])
def test_half_of_them_are_mirrored_unless_that_is_turned_off(view: View) -> None:
    flips = [cuts_of(view)(position).flip for position in range(6000)]
    assert abs(sum(flips) - 3000) < 4.5 * 39
    plain = cuts_of(view, flip=False)
    assert [dataclasses.replace(cuts_of(view)(p), flip=False) for p in range(50)] == [plain(p) for p in range(50)]


def test_a_box_is_uniform_over_the_grid_inside_a_crop_that_is_cut_as_without() -> None:
    cuts, single = cuts_of(CropWithBox(side=5, grid=4)), cuts_of(SINGLE_CROP)
    boxes = Counter(cuts(position).box for position in range(6000))
    assert boxes.keys() == set(itertools.product((0, 4, 8), (0, 4, 8)))
    assert max(abs(count - 667) for count in boxes.values()) < 4.5 * 24.3  # Binomial(6000, 1/9)
    for position in range(50):
        assert dataclasses.replace(cuts(position), box=None) == single(position)
        x, y, flip = augmentation(3, "source", position, (110, 75), (16, 16))
        assert single(position) == Cut(x, y, flip)
    target = cuts_of(CropWithBox(side=5, grid=4), domain="target")
    assert [target(position).box for position in range(9)] != [cuts(position).box for position in range(9)]
    assert cuts_of(CropWithBox(side=16, grid=8))(7).box == (0, 0)


def test_a_box_larger_than_the_crop_is_refused() -> None:
    with pytest.raises(UserError, match="^a box of 17 pixels does not fit into crops of 16x16: pass --crop 17 or more"):
        cuts_of(CropWithBox(side=17))


def test_draws_are_pinned() -> None:
    """A change of these numbers changes every run: they are part of the format of a checkpoint."""
    tiles = [cuts_of(TILES, domain="target", global_batch=7)(position) for position in (0, 6, 7, 7 * 2**30 + 1)]
    assert tiles == [
        Cut(57, 0, True, (75, 48)), Cut(25, 32, True, (75, 48)), Cut(16, 23, True, (94, 40)),
        Cut(19, 32, False, (100, 52)),
    ]  # fmt: skip
    assert [cuts_of(BOX, crop=64)(position).box for position in (0, 1, 2**40)] == [(54, 40), (42, 28), (50, 60)]


# ---- what the loader gives --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """11 source and 7 target images of 48x32, with labels, lossless."""
    path = tmp_path_factory.mktemp("data")
    write_root(LocalStorage(path), format="png")
    return str(path)


def steps(root: str, view: View, count: int, config: DataConfig = CONFIG, **options: Any) -> list[list[Any]]:
    given: dict[str, Any] = {"seed": 5, "global_batch": 4, "device": CPU}
    loader = Loader(root, config, view, **given | options)
    try:
        return list(islice(loader, count))
    finally:
        loader.close()


def by_slot(batches: Sequence[Any]) -> dict[int, dict[str, Any]]:
    """Of one step, what each slot has in each field."""
    return {
        int(slot): {
            name: value[i].numpy().tobytes() if isinstance(value, Tensor) else value and value[i]
            for name, value in vars(batch).items()
        }
        for batch in batches
        for i, slot in enumerate(batch.slots)
    }


@views
@kinds
def test_two_ranks_and_a_resumed_run_get_what_one_rank_gets(root: str, view: View, kind: str) -> None:
    config = dataclasses.replace(CONFIG, decoder=kind)
    whole = [by_slot(step) for step in steps(root, view, 5, config)]
    assert all(step.keys() == {0, 1, 2, 3} for step in whole)
    ranks = [steps(root, view, 3, config, rank=rank, world_size=2, accumulation=2, first_step=2) for rank in range(2)]
    assert [by_slot([*one, *other]) for one, other in zip(*ranks, strict=True)] == whole[2:]


@views
@pytest.mark.skipif(not has_dali, reason="DALI is not installed")
def test_both_decoders_cut_alike(root: str, view: View) -> None:
    pillow, dali = (steps(root, view, 4, dataclasses.replace(CONFIG, decoder=kind)) for kind in ("pillow", "dali"))
    assert [by_slot(step) for step in pillow] == [by_slot(step) for step in dali]


def test_boxes_are_those_of_their_images(root: str) -> None:
    for step, (batch,) in enumerate(steps(root, BOX, 4)):
        for domain in DOMAINS:
            cuts = cuts_of(BOX, (48, 32), 8, seed=5, domain=domain, global_batch=4)
            expected = [cuts(4 * step + slot).box for slot in range(4)]
            assert getattr(batch, f"{domain}_boxes").tolist() == [list(box) for box in expected if box]
    (plain,), (boxed,) = steps(root, SINGLE_CROP, 1), steps(root, BOX, 1)
    assert plain[0].source_boxes is None and torch.equal(plain[0].source, boxed[0].source)


def test_labels_of_sources_are_cut_like_them_and_change_no_image(root: str) -> None:
    dataset = ImageDataset(root, "train", "source")
    labels = {key: dataset.read(number)[1] for number, key in enumerate(dataset.keys)}
    mirrored = []
    for step, ((plain,), (batch,)) in enumerate(
        zip(steps(root, SINGLE_CROP, 4), steps(root, WITH_LABELS, 4), strict=True)
    ):
        assert plain.source_labels is None and batch.source_labels.dtype == torch.uint8
        for name in ("source", "target"):
            assert torch.equal(getattr(plain, name), getattr(batch, name))
        for slot, key in enumerate(batch.source_keys):
            cut = cuts_of(SINGLE_CROP, (48, 32), 8, seed=5, global_batch=4)(4 * step + slot)
            label = labels[key]
            assert label is not None
            part = label[cut.y : cut.y + 8, cut.x : cut.x + 8]
            assert np.array_equal(batch.source_labels[slot].numpy(), part[:, ::-1] if cut.flip else part)
            mirrored.append(cut.flip)
    assert len(set(mirrored)) == 2


@kinds
def test_a_source_whose_label_is_broken_is_replaced_and_no_other_is(tmp_path: Path, kind: str) -> None:
    write_root(LocalStorage(tmp_path), format="png")
    whole = steps(str(tmp_path), WITH_LABELS, 3)
    break_samples(tmp_path, "source_000004", part="label")
    config = dataclasses.replace(CONFIG, decoder=kind, on_bad_sample="skip")
    replaced = 0
    for (before,), (after,) in zip(whole, steps(str(tmp_path), WITH_LABELS, 3, config), strict=True):
        assert before.target_keys == after.target_keys and "source_000004" not in after.source_keys
        for one, other in zip(before.source_keys, after.source_keys, strict=True):
            assert one == other or one == "source_000004"
            replaced += one != other
    assert replaced


def test_sources_without_labels_are_named_with_what_does_without(tmp_path: Path) -> None:
    manifest = write_root(LocalStorage(tmp_path))
    splits = manifest.splits | {
        "train/source": write_split(LocalStorage(tmp_path), "train/source", [2], labelled=False)
    }
    (tmp_path / MANIFEST).write_text(dataclasses.replace(manifest, splits=splits).to_json())
    with pytest.raises(
        UserError, match="the source images of .* have no labels: give --method.semantic.labels predicted"
    ):
        steps(str(tmp_path), WITH_LABELS, 0)
    steps(str(tmp_path), SINGLE_CROP, 0)


def test_tiles_are_cut_from_one_zoomed_image_of_each_domain(root: str) -> None:
    for step, (batch,) in enumerate(steps(root, TILES, 11)):
        for domain in DOMAINS:
            (key,) = set(getattr(batch, f"{domain}_keys"))
            samples = ImageDataset(root, "train", domain)
            image = Image.fromarray(samples.read(samples.keys.index(key))[0])
            cuts = cuts_of(TILES, (48, 32), 8, seed=5, domain=domain, global_batch=4)
            for slot, tile in enumerate(getattr(batch, domain)):
                cut = cuts(4 * step + slot)
                whole = np.asarray(image.resize(zoomed_of(cut), Image.Resampling.BILINEAR), np.float32)
                expected = whole[cut.y : cut.y + 8, cut.x : cut.x + 8]
                expected = expected[:, ::-1] if cut.flip else expected
                pixels = (tile.permute(1, 2, 0).numpy() + 1) * 127.5
                assert np.abs(pixels - expected).max() < 1.01  # one grey level


def test_tiles_are_of_the_first_image_of_each_domain_which_is_said(root: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    batches = [batch for step in steps(root, TILES, 12) for batch in step]
    for domain in DOMAINS:
        (key,) = {key for batch in batches for key in getattr(batch, f"{domain}_keys")}
        assert key == ImageDataset(root, "train", domain).keys[0]
    assert [record.message for record in caplog.records] == [
        f"of the {count} {domain} images the first is trained on, and no other"
        for domain, count in (("source", 11), ("target", 7))
    ]
    assert not torch.equal(batches[0].source, batches[1].source)


def test_an_image_is_decoded_once_for_all_its_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_root(LocalStorage(tmp_path), source=(1,), target=(1,))
    opened, original = [], decode._open

    def watched(file: Any, labels: bool) -> Image.Image:
        opened.append(file.name)
        return original(file, labels)

    monkeypatch.setattr(decode, "_open", watched)
    steps(str(tmp_path), TILES, 6)
    assert sorted(opened) == [f"image {name}_000000 in train/{name}/000000.tar" for name in DOMAINS]


def test_an_epoch_of_tiles_is_what_the_method_says(root: str) -> None:
    counts = []
    for view in (SINGLE_CROP, TILES, LabelledCrop(domain="target")):
        loader = Loader(root, CONFIG, view, seed=0, global_batch=1, device=CPU)
        loader.close()
        counts.append(loader.epoch_samples)
    assert counts == [11, 100, 7]


def test_where_the_one_image_is_broken_nothing_takes_its_place(tmp_path: Path) -> None:
    write_root(LocalStorage(tmp_path))
    break_samples(tmp_path, "source_000000")
    with pytest.raises(UserError, match="none of 100 source samples drawn for one place can be used"):
        steps(str(tmp_path), TILES, 1, dataclasses.replace(CONFIG, on_bad_sample="skip"))


# ---- what a method does with it ---------------------------------------------------------------------------------------


class Tiny(Method[Any, Tensor]):
    """One convolution, whose loss takes what the view gives beside the images."""

    phases = (Phase(name="net", optimiser="net", differentiates=True),)
    optimisers = (OptimiserSpec(name="net", networks=("net",)),)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 3, 3, padding=1)
        self.product = nn.ModuleDict({"net": self.net})

    def forward(self, batch: Any, context: StepContext, name: str = "translate") -> Tensor:
        return self.net(batch.images if hasattr(batch, "labels") else batch.source)

    def loss(self, phase: str, outputs: Tensor, batch: Any, context: StepContext) -> tuple[Tensor, Losses]:
        if hasattr(batch, "labels"):
            value = (outputs.mean(1) - batch.labels / 19).square().mean()
        elif batch.source_boxes is not None:
            inner = [
                image[:, y : y + BOX.side, x : x + BOX.side]
                for image, (x, y) in zip(outputs, batch.source_boxes.tolist(), strict=True)
            ]
            value = torch.stack(inner).square().mean()
        else:
            value = (outputs - batch.target).square().mean()
        return value, {"loss": value.detach()}


@views
def test_a_method_takes_a_step_with_what_it_wants(root: str, view: View) -> None:
    method, engine = Tiny(), Engine(EngineConfig(device="cpu", precision="fp32"))
    engine.prepare(method, OptimConfig(kind="sgd", lr=0.1, momentum=0.0))
    before = method.net.weight.detach().clone()
    (batches,) = steps(root, view, 1, accumulation=2)
    losses = train_step(method, engine, batches, StepContext(Draws(0, 0)))
    assert losses["loss"] > 0 and not torch.equal(method.net.weight, before)
