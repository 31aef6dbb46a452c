"""Unmatched statistics made of pairs: who goes where, what is added back, and the distributions that are left."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra.errors import UserError
from infra.storage import LocalStorage
from pipelines.distributions import CHART, GREY_NAMES, distributions, grey_histogram, total_variation, training_mismatch
from pipelines.inspection import describe
from pipelines.manifest import Manifest, load_manifest
from pipelines.prepare import prepare
from pipelines.sources.base import Source
from pipelines.sources.driving import cityscapes
from pipelines.sources.mismatch import Mismatch, unmatched_labels, unmatched_maps
from pipelines.sources.photos import paired
from tests.pipelines.preparing import SMALL, contents, photo, run, save

pytestmark = pytest.mark.slow

ROAD, VEGETATION, SKY = 7, 21, 23  # labelIds
LAND, PARK = 230, 205  # grey levels of the drawn maps


@pytest.fixture
def store(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "out")


def numbers(source: Source, split: str) -> list[int]:
    return [int(item.name.lstrip("s")) for item in source.splits[split]]


@pytest.fixture
def city(tmp_path: Path) -> Path:
    """Ten scenes of mostly vegetation (3, 6, 9, ...) and twenty of mostly road, under some sky."""
    root = tmp_path / "city"
    for number in range(30):
        scene = np.full((16, 32), ROAD if number % 3 else VEGETATION, np.uint8)
        scene[: 1 + number % 5] = SKY
        save(root / "leftImg8bit/train/x" / f"s{number:02d}_leftImg8bit.png", photo(number))
        save(root / "gtFine/train/x" / f"s{number:02d}_gtFine_labelIds.png", scene)
    save(root / "leftImg8bit/val/x/s00_leftImg8bit.png", photo(0))
    save(root / "gtFine/val/x/s00_gtFine_labelIds.png", scene)
    return root


def of_city(city: Path, **options: Any) -> Source:
    return unmatched_labels(cityscapes(city), Mismatch(**options), progress=False)


def test_the_sources_are_the_scenes_with_less_vegetation(city: Path) -> None:
    chosen = of_city(city)
    assert numbers(chosen, "train/source") == [number for number in range(30) if number % 3]
    assert numbers(chosen, "train/target") == [number for number in range(30) if number % 3 == 0]
    assert numbers(chosen, "test/source") == [0] and chosen.paired
    assert chosen.parameters == {"source": "cityscapes", "domain": "label2city", "mismatch": "k-means", "seed": 0}


def test_a_share_of_the_opposite_cluster_is_added(city: Path) -> None:
    """20 scenes of one cluster and 10 of the other: half of the other is 5 sources and 10 targets more."""
    half = of_city(city, add_opposite=50)
    sources, targets = numbers(half, "train/source"), numbers(half, "train/target")
    assert sources == sorted(sources) and targets == sorted(targets)
    assert sum(number % 3 == 0 for number in sources) == 5 and len(sources) == 20 + 5
    assert sum(number % 3 != 0 for number in targets) == 10 and len(targets) == 10 + 10
    assert half.parameters["add_opposite"] == 50

    assert set(numbers(of_city(city, add_opposite=20), "train/target")) < set(targets)
    everything = of_city(city, add_opposite=100)
    assert numbers(everything, "train/source") == numbers(everything, "train/target") == list(range(30))


def test_the_seed_draws_what_is_added_and_nothing_else(city: Path) -> None:
    one, again, other = (of_city(city, add_opposite=30, seed=seed) for seed in (1, 1, 2))
    assert one == again
    for side, own in (("train/source", {1, 2}), ("train/target", {0})):
        drawn, redrawn = ({n for n in numbers(each, side) if n % 3 not in own} for each in (one, other))
        assert len(drawn) == len(redrawn) and drawn != redrawn
    assert numbers(of_city(city, seed=1), "train/source") == numbers(of_city(city, seed=2), "train/source")


TENTHS_OF_PARK = (8, 1, 1, 3, 1, 8, 1, 3, 1, 3)  # of maps in turn: half of them have one


def map_of(number: int) -> np.ndarray:
    """A map of plain land under a park."""
    map_HW3 = np.full((20, 20, 3), LAND, np.uint8)
    map_HW3[: 2 * TENTHS_OF_PARK[number % 10]] = PARK
    return map_HW3


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """Forty pairs of photo and map."""
    for number in range(40):
        save(tmp_path / "maps/train" / f"{number:02d}.png", np.hstack([photo(number, 20, 20), map_of(number)]))
    save(tmp_path / "maps/val/00.png", np.hstack([photo(0, 20, 20), map_of(0)]))
    return tmp_path / "maps"


def of_maps(directory: Path, direction: str = "BtoA", **options: Any) -> Source:
    side = "source" if direction == "BtoA" else "target"
    return unmatched_maps(paired(directory, direction), side, Mismatch(**options), progress=False)


def test_maps_are_halved_by_rank_and_a_tenth_is_mixed(maps: Path) -> None:
    """K-means finds 32 maps and 8, but the halves are equal: the twelve with three tenths of park join the eight."""
    chosen = of_maps(maps)
    map_side, photo_side = set(numbers(chosen, "train/source")), set(numbers(chosen, "train/target"))
    plain = {number for number in range(40) if TENTHS_OF_PARK[number % 10] == 1}
    assert len(plain) == 20 and plain < map_side and set(range(40)) - plain < photo_side
    assert len(map_side - plain) == len(photo_side & plain) == 2


def test_what_each_side_gets_of_the_other_is_drawn_apart(maps: Path) -> None:
    """Both halves have 20 pairs, of which the other side gets ten: not those in the same places."""
    chosen = of_maps(maps, add_opposite=40)
    plain = [number for number in range(40) if TENTHS_OF_PARK[number % 10] == 1]
    halves = {"train/source": [number for number in range(40) if number not in plain], "train/target": plain}
    places = [[half.index(n) for n in numbers(chosen, side) if n in half] for side, half in halves.items()]
    assert len(places[0]) == len(places[1]) == 10 and places[0] != places[1]


def test_the_same_maps_whatever_the_direction(maps: Path) -> None:
    forth, back = of_maps(maps, "BtoA", add_opposite=20), of_maps(maps, "AtoB", add_opposite=20)
    assert numbers(forth, "train/source") == numbers(back, "train/target")
    assert numbers(forth, "train/target") == numbers(back, "train/source")
    assert len(numbers(forth, "train/source")) == 20 + 2 + 4
    assert forth.grey_histograms["train/source"] == back.grey_histograms["train/target"]


def test_adding_all_that_is_left_makes_the_two_alike(maps: Path, store: LocalStorage) -> None:
    manifest = run(of_maps(maps, add_opposite=90), store)
    assert training_mismatch(distributions(manifest)) == 0


def test_grey_levels_are_counted_in_bins_of_five() -> None:
    levels = np.repeat(np.array([[0, 4, 5, 249, 250, 254, 255]], np.uint8)[:, :, None], 3, axis=2)
    counts = grey_histogram(Image.fromarray(levels))
    assert counts.shape == (51,) == (len(GREY_NAMES),)
    assert (counts[0], counts[1], counts[49], counts[50], counts.sum()) == (2, 1, 1, 3, 7)
    assert (GREY_NAMES[0], GREY_NAMES[1], GREY_NAMES[49], GREY_NAMES[50]) == ("0-4", "5-9", "245-249", "250-255")


def test_the_grey_levels_of_both_sides_are_those_of_the_maps(maps: Path, store: LocalStorage) -> None:
    manifest = run(of_maps(maps), store)
    assert manifest == load_manifest(store)
    found = distributions(manifest)
    park, land = GREY_NAMES.index(f"{PARK}-{PARK + 4}"), GREY_NAMES.index(f"{LAND}-{LAND + 4}")
    source, target = found["train/source"].shares, found["train/target"].shares
    assert source[park] < 0.25 < target[park] and source[park] + source[land] > 0.9
    assert found["test/source"].shares == pytest.approx(found["test/target"].shares)
    difference = total_variation(found["train/source"], found["train/target"])
    assert 0.1 < difference == training_mismatch(found)
    text = describe(manifest)
    assert f"  {PARK}-{PARK + 4}" in text and f"differ in {difference:.2%} of their pixels" in text
    assert "  0-4 " not in text


def colours_in(store: LocalStorage) -> set[bytes]:
    chart = Image.open(io.BytesIO(store.read(CHART)))
    assert chart.mode == "RGB"
    return {pixel.tobytes() for pixel in np.unique(np.asarray(chart).reshape(-1, 3), axis=0)}


BLUE, GREEN = bytes.fromhex("4477aa"), bytes.fromhex("228833")


def test_a_chart_shows_both_domains(city: Path, maps: Path, tmp_path: Path) -> None:
    for source, name in ((of_city(city), "city"), (of_maps(maps), "maps")):
        store = LocalStorage(tmp_path / "charts" / name)
        run(source, store)
        assert {BLUE, GREEN} < colours_in(store)
        assert Image.open(io.BytesIO(store.read(CHART))).size == (1280, 620)


def test_one_labelled_domain_has_a_chart_and_unlabelled_data_has_none(city: Path, maps: Path, tmp_path: Path) -> None:
    one, none = LocalStorage(tmp_path / "one"), LocalStorage(tmp_path / "none")
    run(cityscapes(city, "target"), one)
    assert GREEN in colours_in(one) and BLUE not in colours_in(one)
    run(paired(maps), none)
    assert none.list(CHART) == []


def test_the_result_is_the_same_for_any_number_of_workers(maps: Path, tmp_path: Path) -> None:
    one, two = LocalStorage(tmp_path / "one"), LocalStorage(tmp_path / "two")
    prepare(of_maps(maps, add_opposite=10), one, SMALL, workers=1, progress=False)
    prepare(of_maps(maps, add_opposite=10), two, SMALL, workers=2, progress=False)
    assert contents(one) == contents(two)


def test_manifests_without_grey_levels_are_read(maps: Path, store: LocalStorage) -> None:
    manifest = run(paired(maps), store)
    text = manifest.to_json()
    assert '"grey_histogram": null' in text
    older = "\n".join(
        line for line in text.splitlines() if "grey_histogram" not in line and '"sha256": "' not in line[:12]
    )
    assert Manifest.from_json(older) == manifest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"add_opposite": -1}, "-1 % of the opposite cluster cannot be added: give 0 to 100"),
        ({"add_opposite": 101}, "101 % of the opposite"),
        ({"add_opposite": float("nan")}, "nan % of the opposite"),
        ({"seed": -1}, "the seed -1 is impossible"),
        ({"seed": 2**32}, "the seed 4294967296 is impossible"),
    ],
)
def test_an_impossible_mismatch_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Mismatch(**options)


def test_more_maps_than_there_are_cannot_be_added(maps: Path) -> None:
    with pytest.raises(UserError, match="91 % .* the 10 % that are mixed in anyway: give 0 to 90"):
        of_maps(maps, add_opposite=91)


@pytest.mark.parametrize("count", [1, 3])
def test_pairs_that_are_too_few_or_alike_are_refused(tmp_path: Path, count: int) -> None:
    for number in range(count):
        save(tmp_path / "maps/train" / f"{number}.png", photo(9, 32, 16))
    with pytest.raises(UserError, match=f"{count} training pairs? with the same statistics cannot be split in two"):
        of_maps(tmp_path / "maps")


def test_scenes_without_labels_are_refused(maps: Path) -> None:
    with pytest.raises(UserError, match="00 has no label to cluster by"):
        unmatched_labels(paired(maps), Mismatch(), progress=False)


def test_real_maps_with_parks_go_to_the_photos(shared_data: Path, tmp_path: Path, store: LocalStorage) -> None:
    real = shared_data / "maps_pairs_256"
    for path in sorted((real / "map").iterdir()):
        satellite = next((real / "satellite").glob(f"{path.stem}.*"))
        both = [np.asarray(Image.open(each).convert("RGB")) for each in (satellite, path)]
        save(tmp_path / "maps/train" / f"{path.stem}.bmp", np.hstack(both))
    chosen = of_maps(tmp_path / "maps")
    sizes = [len(chosen.splits[f"train/{domain}"]) for domain in ("source", "target")]
    assert sizes == [20 + 2, 20 + 2]
    manifest = run(chosen, store)
    park = GREY_NAMES.index("210-214")
    found = distributions(manifest)
    assert found["train/target"].shares[park] > 2 * found["train/source"].shares[park]
