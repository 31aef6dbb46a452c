"""Unlabelled images as their publishers lay them out: two folders, or two images in one file."""

from pathlib import Path

import numpy as np
import pytest

from infra.errors import UserError
from pipelines.sources.base import Source
from pipelines.sources.photos import folders, paired
from tests.pipelines.preparing import photo, save
from trainer.tasks import TASKS, prepare_command


def names(source: Source) -> dict[str, list[str]]:
    return {split: [item.name for item in items] for split, items in source.splits.items()}


def fill(directory: Path, *files: str) -> Path:
    for file in files:
        save(directory / file, photo(1))
    return directory


def test_letters_are_the_default_and_may_be_swapped(tmp_path: Path) -> None:
    fill(tmp_path, "trainA/monet.jpg", "trainB/photo.jpg", "testA/monet2.jpg")
    assert names(folders(tmp_path)) == {
        "train/source": ["monet"], "train/target": ["photo"], "test/source": ["monet2"],
    }  # fmt: skip
    assert folders(tmp_path).parameters == {"source": "folders"}
    swapped = folders(tmp_path, ("B", "A"))
    assert names(swapped) == {"train/source": ["photo"], "train/target": ["monet"], "test/target": ["monet2"]}
    assert swapped.parameters == {"source": "folders", "domains": ["B", "A"]}


@pytest.mark.parametrize("held_out", ["val", "test"])  # AFHQ, and its second version
def test_folders_inside_train_have_names(tmp_path: Path, held_out: str) -> None:
    animals = [f"{phase}/{kind}/{phase}-{kind}.png" for phase in ("train", held_out) for kind in ("cat", "dog", "wild")]
    assert names(folders(fill(tmp_path, *animals), ("cat", "dog"))) == {
        "train/source": ["train-cat"], "train/target": ["train-dog"],
        "test/source": [f"{held_out}-cat"], "test/target": [f"{held_out}-dog"],
    }  # fmt: skip


def test_a_name_without_a_training_folder_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/1.png", "val/dog/1.png")
    with pytest.raises(UserError, match="traindog does not exist, nor does .*train/dog: .*--domains"):
        folders(tmp_path, ("cat", "dog"))


def night2day(directory: Path) -> Path:
    """Two nights and three days of camera 14, one of each of camera 2; images of one camera are paired with all."""
    pairs = [(14, night, day) for night in (100, 101) for day in (110, 111, 112)] + [(2, 100, 9)]
    for camera, night, day in pairs:
        halves = [photo(night, 16, 16), photo(day, 16, 16)]
        save(directory / "train" / f"{camera}_{night}_to_{day}.png", np.hstack(halves))
        save(directory / "test" / f"{camera}_{night}_to_{day}.png", np.hstack(halves))
    return directory


def test_an_image_of_many_pairs_is_trained_on_once(tmp_path: Path) -> None:
    source = paired(night2day(tmp_path), "BtoA", distinct=True)
    assert source.parameters == {"source": "paired", "direction": "BtoA", "distinct": True}
    shown = {
        split: [(item.name.split("_")[0], int(np.asarray(item.load((8, 8))[0])[0, 0, 0])) for item in items]
        for split, items in source.splits.items()
    }
    assert sorted(shown["train/source"]) == [("14", 110), ("14", 111), ("14", 112), ("2", 9)]
    assert sorted(shown["train/target"]) == [("14", 100), ("14", 101), ("2", 100)]
    assert len(shown["test/source"]) == len(shown["test/target"]) == 7 and source.paired


def test_files_of_other_names_have_no_distinct_images(tmp_path: Path) -> None:
    save(night2day(tmp_path) / "train" / "photo_17.png", photo(1))
    with pytest.raises(UserError, match="photo_17.png is not called SCENE_A_to_B .*--distinct"):
        paired(tmp_path, distinct=True)
    assert len(paired(tmp_path).splits["train/source"]) == 8


LAID_OUT = {
    "horse2zebra": ["trainA/1.jpg", "trainB/1.jpg", "testA/1.jpg", "testB/1.jpg"],
    "summer2winter": ["trainA/1.jpg", "trainB/1.jpg", "testA/1.jpg", "testB/1.jpg"],
    "apple2orange": ["trainA/1.jpg", "trainB/1.jpg", "testA/1.jpg", "testB/1.jpg"],
    "cat2dog": ["train/cat/1.jpg", "train/dog/1.jpg", "train/wild/1.jpg", "val/cat/1.jpg", "val/dog/1.jpg"],
    "day2night": ["train/0_1_to_2.jpg", "val/0_3_to_4.jpg", "test/0_5_to_6.jpg"],
    "map2photo": [f"{phase}/{number}.jpg" for phase in ("train", "val") for number in range(4)],
}
LAID_OUT["photo2map"] = LAID_OUT["map2photo"]


@pytest.mark.parametrize("task", LAID_OUT)
def test_the_command_of_each_task_takes_the_published_layout(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch.prepare import parser, source_of

    program, script, *words = prepare_command(task).split()
    assert (program, script) == ("python", "launch/prepare.py")
    args = parser().parse_args(words)
    for number, file in enumerate(LAID_OUT[task]):
        save(tmp_path / args.directory / file, photo(30 * number))
    monkeypatch.chdir(tmp_path)
    assert {"train/source", "train/target"} < set(source_of(args).splits)
    assert args.size == "{}x{}".format(*TASKS[task].size)
