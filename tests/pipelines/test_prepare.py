"""From source folders to a complete data root: what lies where, restarts, and what bad input gets."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from infra.errors import UserError
from infra.storage import LocalStorage, open_storage
from pipelines.inspection import describe, verify
from pipelines.labels import CLASSES, PALETTE, class_histogram
from pipelines.manifest import MANIFEST, load_manifest
from pipelines.prepare import PREPARING, Encoding, prepare
from pipelines.sources.drawn import SOURCE_LAYOUT, TARGET_LAYOUT, change_layout, mismatched, street_scenes
from pipelines.sources.driving import cityscapes, gta5
from pipelines.sources.photos import folders, paired
from tests.conftest import S3Server
from tests.pipelines.preparing import SMALL, contents, labelled_parts, parts, photo, run, save

SKY, ROAD = CLASSES.index("sky"), CLASSES.index("road")


@pytest.fixture
def store(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "out")


@pytest.fixture
def two_folders(tmp_path: Path) -> Path:
    for number in range(7):
        save(tmp_path / "data" / "trainA" / f"a.{number} ä.png", photo(number))
    for number in range(2):
        save(tmp_path / "data" / "trainB" / "deep" / f"{number}.png", photo(100 + number))
    save(tmp_path / "data" / "testB" / "0.png", photo(200))
    return tmp_path / "data"


def test_folders_become_splits(two_folders: Path, store: LocalStorage) -> None:
    manifest = run(folders(two_folders), store)
    assert manifest == load_manifest(store)
    counts = {name: [shard.samples for shard in split.shards] for name, split in manifest.splits.items()}
    assert counts == {"train/source": [3, 3, 1], "train/target": [2], "test/target": [1]}
    assert not manifest.paired
    assert manifest.splits["train/source"].image_size == (16, 8)
    assert manifest.splits["train/source"].label_space is None
    samples = parts(store, manifest, "train/source")
    assert [key for key, _, _ in samples] == [f"{number:06d}-a-{number}-" for number in range(7)]
    assert [image[0, 0, 0] for _, image, _ in samples] == list(range(7))
    assert all(image.shape == (8, 16, 3) and label is None for _, image, label in samples)
    verify(store, manifest, progress=False)


def test_a_rerun_changes_nothing(two_folders: Path, store: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(folders(two_folders), store, SMALL)
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    manifest = prepare(folders(two_folders), store, SMALL)
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before
    assert manifest == load_manifest(store)
    assert "already prepared" in capsys.readouterr().out


class BreaksOff(LocalStorage):
    """A store whose preparation is killed before its last step."""

    def write(self, name: str, data: bytes) -> None:
        if name == MANIFEST:
            raise KeyboardInterrupt
        super().write(name, data)


def break_off(data: Path, root: Path) -> LocalStorage:
    """A root whose shards are there and whose manifest is not."""
    with pytest.raises(KeyboardInterrupt):
        run(folders(data), BreaksOff(root))
    return LocalStorage(root)


def written(storage: LocalStorage) -> dict[str, int]:
    return {name: (storage.root / name).stat().st_mtime_ns for name in storage.list() if name.endswith(".tar")}


def test_a_preparation_that_broke_off_is_continued(two_folders: Path, tmp_path: Path) -> None:
    whole, broken = LocalStorage(tmp_path / "whole"), break_off(two_folders, tmp_path / "broken")
    run(folders(two_folders), whole)
    broken.delete("train/source/000001.index.json")  # one shard without its index,
    broken.write("train/target/000000.tar", b"cut off")  # one cut off,
    (broken.root / "train/source/.tmp-left").write_bytes(b"half")  # and one half written
    before = written(broken)
    run(folders(two_folders), broken)
    assert contents(broken) == contents(whole)
    kept = {name for name, time in written(broken).items() if before[name] == time}
    assert kept == set(before) - {"train/source/000001.tar", "train/target/000000.tar"}
    assert not list(broken.root.rglob(".tmp-*"))


def mend(data: Path) -> None:
    save(data / "trainA" / "a.4 ä.png", photo(77, 64, 32))


def add_and_remove(data: Path) -> None:
    save(data / "trainB" / "deep" / "2.png", photo(102))
    (data / "trainA" / "a.6 ä.png").unlink()  # the only one of its shard


@pytest.mark.parametrize(
    ("change", "made_again"),
    [(mend, {"train/source/000001.tar"}), (add_and_remove, {"train/source/000002.tar", "train/target/000000.tar"})],
)
def test_input_that_was_mended_costs_its_own_shards(
    two_folders: Path, tmp_path: Path, change: Callable[[Path], None], made_again: set[str]
) -> None:
    broken, whole = break_off(two_folders, tmp_path / "broken"), LocalStorage(tmp_path / "whole")
    before = written(broken)
    change(two_folders)
    run(folders(two_folders), broken)
    run(folders(two_folders), whole)
    assert contents(broken) == contents(whole)
    after = written(broken)
    assert {name for name in before if after.get(name) != before[name]} == made_again


def test_an_unfinished_root_of_other_data_is_refused(two_folders: Path, tmp_path: Path) -> None:
    broken = break_off(two_folders, tmp_path / "broken")
    before = contents(broken)
    for name in ("trainA", "trainB"):
        save(tmp_path / "other" / name / "x.png", photo(1))
    with pytest.raises(UserError, match=r"prepared with inputs\.test/target\.samples = 1, not None: .*delete it first"):
        run(folders(tmp_path / "other"), broken)
    assert contents(broken) == before


def test_s3_gets_the_same_bytes(two_folders: Path, store: LocalStorage, s3_server: S3Server) -> None:
    remote = open_storage(f"s3://{s3_server.make_bucket()}/data")
    run(folders(two_folders), store)
    run(folders(two_folders), remote)
    run(folders(two_folders), remote)
    assert contents(remote) == contents(store)


def test_other_parameters_are_refused_by_name(two_folders: Path, store: LocalStorage) -> None:
    break_off(two_folders, store.root)
    for finish in (False, True):
        if finish:
            run(folders(two_folders), store)
        before = contents(store)
        with pytest.raises(UserError, match=r"prepared with format = png, not jpg: name another output"):
            run(folders(two_folders), store, Encoding((16, 8), format="jpg", shard_size=3))
        assert contents(store) == before


def test_a_finished_root_is_refused_for_other_input(two_folders: Path, store: LocalStorage) -> None:
    run(folders(two_folders), store)
    before = contents(store)
    save(two_folders / "trainB" / "another.png", photo(3))
    with pytest.raises(UserError, match=r"inputs.train/target.samples = 2, not 3"):
        run(folders(two_folders), store)
    assert contents(store) == before
    assert PREPARING not in before


def test_a_failed_start_does_not_bind_the_folder(store: LocalStorage) -> None:
    with pytest.raises(UserError, match="too small"):
        run(street_scenes(count=1, test_count=0), store, Encoding((8, 8)))
    assert run(street_scenes(count=1, test_count=0), store, Encoding((64, 32))).splits["train/source"].samples == 1


def test_a_folder_in_use_is_left_alone(two_folders: Path, store: LocalStorage) -> None:
    store.write("train/mine.txt", b"precious")
    with pytest.raises(UserError, match="unknown origin.*train/mine.txt"):
        run(folders(two_folders), store)
    assert store.list() == ["train/mine.txt"]


def test_an_output_that_cannot_be_written_is_named(two_folders: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file/out"):
        run(folders(two_folders), LocalStorage(tmp_path / "file" / "out"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: [path.unlink() for path in (data / "trainA").iterdir()], "trainA holds no images"),
        (lambda data: (data / "trainA").rename(data / "elsewhere"), "trainA does not exist"),
        (lambda data: (data / "trainB" / "zz.jpg").write_text("no image"), "zz.jpg cannot be read as an image"),
        (lambda data: (data / "trainB" / "zz.jpg").symlink_to("nothing"), "zz.jpg"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(
    two_folders: Path, store: LocalStorage, spoil: Callable[[Path], object], words: str
) -> None:
    spoil(two_folders)
    with pytest.raises(UserError, match=words):
        run(folders(two_folders), store)
    assert not store.root.exists()


@pytest.mark.parametrize("options", [{"format": "gif"}, {"quality": 0}, {"quality": 101}, {"shard_size": 0}], ids=str)
def test_an_impossible_encoding_is_refused(options: dict) -> None:
    with pytest.raises(UserError):
        Encoding((16, 8), **options)


@pytest.mark.parametrize(("direction", "source_value"), [("AtoB", 10), ("BtoA", 20)])
def test_pairs_are_cut_in_half(tmp_path: Path, store: LocalStorage, direction: str, source_value: int) -> None:
    both = np.concatenate([photo(10, 16, 16), photo(20, 16, 16)], axis=1)
    for number in range(2):
        save(tmp_path / "maps" / "train" / f"{number}.png", both)
        save(tmp_path / "maps" / "val" / f"{number}.png", both + np.uint8(number))
    manifest = run(paired(tmp_path / "maps", direction), store)
    assert manifest.paired
    source, target = (parts(store, manifest, f"test/{domain}") for domain in ("source", "target"))
    assert [key for key, _, _ in source] == [key for key, _, _ in target]
    for number in range(2):
        assert (source[number][1] == source_value + number).all()
        assert (target[number][1] == 30 - source_value + number).all()


def test_a_pair_of_odd_width_is_named(tmp_path: Path, store: LocalStorage) -> None:
    save(tmp_path / "maps" / "train" / "odd.png", photo(1, 33))
    with pytest.raises(UserError, match="odd.png has an odd width"):
        run(paired(tmp_path / "maps"), store)


def labelids(width: int = 32, height: int = 16) -> np.ndarray:
    """The upper half sky (labelId 23), the lower half road (7), one corner void (0)."""
    label = np.full((height, width), 23, np.uint8)
    label[height // 2 :] = 7
    label[:4, :4] = 0
    return label


@pytest.fixture
def city(tmp_path: Path) -> Path:
    root = tmp_path / "city"
    for phase, names in (("train", ("aachen_0_1", "bonn_0_1", "bonn_0_2")), ("val", ("ulm_0_1",))):
        for number, name in enumerate(names):
            town = name.split("_")[0]
            save(root / "leftImg8bit" / phase / town / f"{name}_leftImg8bit.png", photo(number))
            save(root / "gtFine" / phase / town / f"{name}_gtFine_labelIds.png", labelids())
    return root


def test_cityscapes_as_label_to_city(city: Path, store: LocalStorage) -> None:
    manifest = run(cityscapes(city), store)
    assert manifest.paired
    split = manifest.splits["train/source"]
    assert split.label_space == "cityscapes19"
    assert {CLASSES[i]: n for i, n in enumerate(split.class_histogram or ()) if n} == {"road": 192, "sky": 180}
    source, target = (labelled_parts(store, manifest, f"train/{domain}") for domain in ("source", "target"))
    for (key, image, label), (other_key, photograph, other_label) in zip(source, target, strict=True):
        assert key == other_key
        assert np.array_equal(label, other_label)
        assert (label[:2, :2] == 255).all() and (label[-1] == ROAD).all()
        assert (image[label == SKY] == PALETTE[SKY]).all() and (image[label == 255] == 0).all()
        assert (photograph == int(key[:6])).all()
    assert "sky" in describe(manifest) and "48.39%" in describe(manifest)


def test_cityscapes_as_one_domain(city: Path, store: LocalStorage) -> None:
    assert set(run(cityscapes(city, "source"), store).splits) == {"train/source", "test/source"}


def test_a_frame_without_label_is_named(city: Path) -> None:
    (city / "gtFine/train/bonn/bonn_0_2_gtFine_labelIds.png").unlink()
    with pytest.raises(UserError, match=r"bonn_0_2_gtFine_labelIds.png is missing"):
        cityscapes(city)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (labelids(30), "aachen_0_1_gtFine_labelIds.png does not have the size of its image"),
        (np.full((16, 32), 255, np.uint8), "aachen_0_1_gtFine_labelIds.png holds the id 255"),
        (np.full((16, 32, 3), 9, np.uint8), "aachen_0_1_gtFine_labelIds.png holds none of the 19 class colours"),
        (np.full((16, 32, 2), 9, np.uint8), "aachen_0_1_gtFine_labelIds.png"),
    ],
)
def test_labels_that_do_not_fit_are_named(city: Path, store: LocalStorage, label: np.ndarray, words: str) -> None:
    save(city / "gtFine/train/aachen/aachen_0_1_gtFine_labelIds.png", label)
    with pytest.raises(UserError, match=words):
        run(cityscapes(city, "target"), store)
    assert not store.list("manifest")


@pytest.fixture
def game(tmp_path: Path) -> Path:
    for number in range(8):
        save(tmp_path / "gta" / "images" / f"{number:05d}.png", photo(number))
        save(tmp_path / "gta" / "labels" / f"{number:05d}.png", labelids(), palette=list(range(105)))
    return tmp_path / "gta"


def test_gta5_with_cityscapes_is_gta2city(game: Path, city: Path, store: LocalStorage) -> None:
    manifest = run(gta5(game, city, held_out=3), store)
    assert {name: split.samples for name, split in manifest.splits.items()} == {
        "train/source": 5, "test/source": 3, "train/target": 3, "test/target": 1,
    }  # fmt: skip
    assert not manifest.paired
    stems = sorted((f"{number:05d}" for number in range(8)), key=lambda stem: hashlib.sha256(stem.encode()).digest())
    held_out = labelled_parts(store, manifest, "test/source")
    assert sorted(key.split("-")[1] for key, _, _ in held_out) == sorted(stems[:3])
    assert (held_out[0][2][-1] == ROAD).all()


def test_gta5_frames_of_two_sizes(game: Path, store: LocalStorage) -> None:
    save(game / "labels" / "00004.png", labelids(30))
    with pytest.raises(UserError, match=r"labels/00004.png does not have the size.*--leave-out-mismatched"):
        run(gta5(game, held_out=2), store)
    manifest = run(gta5(game, held_out=2, leave_out_mismatched=True), store)
    stems = {key.split("-")[1] for name in manifest.splits for key, _, _ in parts(store, manifest, name)}
    assert stems == {f"{number:05d}" for number in range(8)} - {"00004"}


def test_holding_out_everything_is_refused(game: Path) -> None:
    with pytest.raises(UserError, match="500 of the 8 images.*--held-out"):
        gta5(game)


def test_street_scenes_are_two_worlds_and_held_out_pairs(store: LocalStorage) -> None:
    manifest = run(street_scenes(count=4, test_count=2, seed=1), store, Encoding((64, 32), format="png"))
    assert manifest.paired
    source, target = (labelled_parts(store, manifest, f"test/{domain}") for domain in ("source", "target"))
    for (key, game_look, label), (other_key, camera_look, other_label) in zip(source, target, strict=True):
        assert key == other_key
        assert np.array_equal(label, other_label)
        assert not np.array_equal(game_look, camera_look)
    labels = [label.tobytes() for name in manifest.splits for _, _, label in labelled_parts(store, manifest, name)]
    assert len(set(labels)) == 4 + 4 + 2
    histograms = [class_histogram(label) for _, _, label in labelled_parts(store, manifest, "train/source")]
    assert tuple(np.sum(histograms, axis=0)) == manifest.splits["train/source"].class_histogram


def test_the_test_worlds_do_not_depend_on_the_count() -> None:
    assert street_scenes(count=4).splits["test/source"] == street_scenes(count=9).splits["test/source"]


def test_a_layout_is_changed_by_field() -> None:
    changed = change_layout(SOURCE_LAYOUT, ["street_trees=0.5", "floors=2,6"])
    assert (changed.street_trees, changed.floors, changed.traffic) == (0.5, (2, 6), SOURCE_LAYOUT.traffic)


def test_a_mismatch_lies_between_the_two_layouts() -> None:
    assert mismatched(0) == SOURCE_LAYOUT and mismatched(1) == TARGET_LAYOUT
    half = mismatched(0.5)
    assert half.street_trees == pytest.approx(0.41) and half.floors == (2, 6) and half.tree_height == (5.5, 10.0)
    with pytest.raises(UserError, match=r"mismatch of 1\.5"):
        mismatched(1.5)


@pytest.mark.parametrize("change", ["clouds=1", "floors=2", "street_trees=many", "street_trees", "floors=1.5,2"])
def test_an_impossible_layout_is_refused(change: str) -> None:
    with pytest.raises(UserError, match=change.split("=")[0]):
        change_layout(SOURCE_LAYOUT, [change])


@pytest.mark.parametrize("options", [{"count": 0}, {"test_count": -1}, {"count": 2_000_000}, {"seed": -1}], ids=str)
def test_impossible_street_scenes_are_refused(options: dict) -> None:
    with pytest.raises(UserError):
        street_scenes(**options)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "spoil", "words"),
    [
        ("train/source/000001.tar", flip_a_byte, "is damaged"),
        ("train/source/000001.tar", lambda path: path.write_bytes(path.read_bytes()[:700]), "has 700 bytes instead of"),
        ("train/source/000001.tar", Path.unlink, "is missing"),
        ("train/source/000001.index.json", flip_a_byte, "is damaged"),
        ("train/source/000001.index.json", Path.unlink, "is missing"),
    ],
)
def test_the_first_bad_shard_is_named(
    two_folders: Path, store: LocalStorage, file: str, spoil: Callable[[Path], object], words: str
) -> None:
    manifest = run(folders(two_folders), store)
    spoil(store.root / file)
    flip_a_byte(store.root / "train/target/000000.tar")
    with pytest.raises(UserError, match=f"{file} {words}"):
        verify(store, manifest, progress=False)


def test_real_photographs_are_prepared(shared_data: Path, store: LocalStorage, tmp_path: Path) -> None:
    for phase in ("train", "val"):
        (tmp_path / "pairs" / phase).mkdir(parents=True)
        for path in sorted((shared_data / "facades" / phase).iterdir())[:4]:
            (tmp_path / "pairs" / phase / path.name).symlink_to(path)
    manifest = run(paired(tmp_path / "pairs", "BtoA"), store, Encoding((256, 256)))
    assert [split.samples for split in manifest.splits.values()] == [4, 4, 4, 4]
    for name in manifest.splits:
        assert np.mean([image.std() for _, image, _ in parts(store, manifest, name)]) > 10
