"""The README of a model in the layout of the Hugging Face Hub, and the picture in it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from infra import tables
from infra.errors import UserError
from infra.images import eight_bits
from infra.json_lines import read_json
from launch.runs.folder import run_around
from launch.runs.report import metrics_table
from pipelines.images import picture_of
from trainer.samples import stack
from trainer.tasks import TASKS
from trainer.translator import Translator


def figures(checkpoint: Path) -> dict[str, Any]:
    """The metrics of a checkpoint in a run folder: those of launch/evaluate.py if they are its, else those found during
    training; empty where there are none."""
    run = run_around(checkpoint)
    row = read_json(run.evaluation_file, dict)
    if str(row.get("step")) == checkpoint.resolve().name.removeprefix("step_"):
        return dict(row)
    return run.evaluation_of(checkpoint)


def sample_picture(translator: Translator, checkpoint: Path, sample: Path | None) -> np.ndarray:
    """An image beside its translation, or where none is given the newest sample grid of the run. UserError if there is none."""
    if sample is not None:
        colours = eight_bits(picture_of(sample).colours)
        return stack([colours, translator(colours, key=sample.name)], axis=1)
    run = run_around(checkpoint)
    grids = {
        int(match[1]): path
        for path in run.samples.glob("step_*.png")
        if (match := re.search(r"(\d+)\.png$", path.name))
    }
    if not grids:
        raise UserError(f"{checkpoint} is in no run folder with sample pictures: give --sample IMAGE")
    return eight_bits(picture_of(grids[max(grids)]).colours)


def model_card(facts: Mapping[str, str], metrics: Mapping[str, Any]) -> str:
    """Markdown with the header that the Hub reads. facts: as `facts_of` gives them. metrics: see `figures`; may be empty. No path
    and no command, which may say more of a machine than is to be public."""
    task, method, licence = facts["task"], facts["method"], facts["licence"]
    name = licence if re.fullmatch(r"[a-z][a-z0-9.-]+", licence) else "other"
    about = TASKS[task].description if task in TASKS else "images of one kind to those of another"
    header = ["---", f"license: {name}", *([] if name == licence else [f"license_name: {json.dumps(licence)}"]),
              "library_name: srunit", "pipeline_tag: image-to-image", "tags:", "- unpaired-image-translation", f"- {method}",
              "---"]  # fmt: skip
    table = metrics_table(dict(metrics)) if metrics else ""
    measured = (
        f"On {metrics.get('images', 'the')} test images, in fp32:\n\n```\n{table}\n```" if table else "Not evaluated."
    )
    rows = [(key, value) for key, value in facts.items() if key != "licence"]
    return "\n".join([
        *header, "", f"# {method}: {about}", "", "![source and translation](sample.png)", "",
        f"A generator trained with {method}, without pairs of images, from the source to the target domain of {task}.", "",
        "## Use", "", "```", "python launch/translate.py THIS_FOLDER INPUT OUTPUT",
        "python launch/export.py THIS_FOLDER --to onnx --uint8 --out model.onnx",
        "python launch/serve.py THIS_FOLDER --port 8000",
        "```", "",
        "`config.json` has the options that the networks are built by, `model.safetensors` their weights.", "",
        "## Figures", "", measured, "", "## Facts", "", tables.markdown(("", ""), rows), "",
        "## Limits", "",
        "It was trained on images of one look and translates others at its own risk. A translation is no measurement: classes "
        "may change (the flip rate says how often), and small things may vanish.", "",
        "## Licence", "", f"Weights: {licence}.", "",
    ])  # fmt: skip
