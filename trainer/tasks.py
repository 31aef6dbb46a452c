"""Task presets: what the papers do for each pair of domains, as a layer of the configuration tree."""

from dataclasses import dataclass, field
from typing import Any

# 20 epochs in all, the second half with a falling rate: "due to the large quantity of the training data" (SRUNIT,
# Appendix F). Every other task keeps CUT's 200 + 200.
TWENTY_EPOCHS = {"optim.epochs": 10.0, "optim.decay_epochs": 10.0}


@dataclass(frozen=True)
class Task:
    """size: (width, height) that `launch/prepare.py` resizes to; crop: what training sees of it; label_space: what its
    labels mean, if it has any; source: where the data is to be had; prepare: the command that prepares it;
    options: the rest of the preset, by dotted name."""

    description: str
    size: tuple[int, int]
    source: str
    prepare: str
    label_space: str | None = None
    crop: int = 256
    options: dict[str, Any] = field(default_factory=dict)


def _folders(name: str) -> str:
    return f"python launch/prepare.py folders {name} --size {{size}} --out data/{{task}}"


def _paired(name: str) -> str:
    return f"python launch/prepare.py paired {name} --size {{size}} --out data/{{task}}"


CITYSCAPES = "https://www.cityscapes-dataset.com (registration)"
CYCLEGAN = "the CycleGAN data sets of UC Berkeley"
PIX2PIX = "the pix2pix data sets of UC Berkeley"

TASKS: dict[str, Task] = {
    "gta2city": Task(
        "GTA5 frames to Cityscapes photos (SRUNIT 5.1.2)", (512, 256),
        f"https://download.visinf.tu-darmstadt.de/data/from_games/ and {CITYSCAPES}",
        "python launch/prepare.py gta5 GTA5 --cityscapes CITYSCAPES --size {size} --out data/{task}",
        "cityscapes19", options=TWENTY_EPOCHS,
    ),
    "label2city": Task(
        "Cityscapes label colours to photos (SRUNIT 5.1.1)", (512, 256), CITYSCAPES,
        "python launch/prepare.py cityscapes CITYSCAPES --mismatch --size {size} --format png --out data/{task}",
        "cityscapes19",
    ),
    "map2photo": Task(
        "Google maps to aerial photos (SRUNIT 5.1.3)", (256, 256), f"maps of {PIX2PIX}",
        _paired("maps --direction BtoA --mismatch"),
    ),
    "photo2map": Task(
        "aerial photos to Google maps (SRUNIT 5.1.4)", (256, 256), f"maps of {PIX2PIX}",
        _paired("maps --direction AtoB --mismatch"),
    ),
    "horse2zebra": Task("horses to zebras (SRUNIT 5.2)", (256, 256), CYCLEGAN, _folders("horse2zebra")),
    "summer2winter": Task(
        "Yosemite in summer to winter (SRUNIT 5.2)", (256, 256), CYCLEGAN, _folders("summer2winter_yosemite"),
    ),
    "day2night": Task(
        "outdoor scenes by day to night (SRUNIT 5.2)", (256, 256), f"night2day of {PIX2PIX}",
        _paired("night2day --direction BtoA --distinct"),
    ),
    # CUT's own tasks: images of 286 pixels, cropped at random (the published default, load 286 and crop 256).
    "apple2orange": Task("apples to oranges (CUT A.2)", (286, 286), CYCLEGAN, _folders("apple2orange")),
    "cat2dog": Task("cats to dogs (CUT A.1)", (286, 286), "AFHQ of StarGAN v2", _folders("afhq --domains cat dog")),
}  # fmt: skip


def overview() -> str:
    """One line per task, for people."""
    lines = []
    for name, task in TASKS.items():
        labels = f", {task.label_space} labels" if task.label_space else ""
        lines.append(f"  {name:14}{task.description}; {task.size[0]}x{task.size[1]}, crop {task.crop}{labels}")
    return "\n".join(lines)


def prepare_command(name: str) -> str:
    """The command that prepares a task's data where `launch/train.py` looks for it."""
    task = TASKS[name]
    return task.prepare.format(size="{}x{}".format(*task.size), task=name)


def preset(name: str) -> dict[str, Any]:
    """A task's layer of the configuration tree."""
    task = TASKS[name]
    return {"data.crop": task.crop, **task.options}
