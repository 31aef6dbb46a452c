"""A trained translation as a file or folder for other programs. `launch/export.py` runs it."""

import argparse
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from infra.errors import UserError
from infra.storage import TEMPORARY, replacing
from launch.runs.card import figures, model_card, sample_picture
from launch.runs.chosen import chosen, load_chosen
from trainer.checkpoint import Checkpoint
from trainer.export.graph import Form, Graph
from trainer.export.onnx import to_onnx
from trainer.export.program import to_library, to_program
from trainer.hub import Hub, write_hub
from trainer.translation import Translation
from trainer.translator import Translator, opened

log = logging.getLogger(__name__)

Write = Callable[[Translation, Graph, Mapping[str, str]], bytes]
FILES: dict[str, Write] = {"onnx": to_onnx, "torch": to_program, "aoti": to_library}
UNSTATED = "not stated: whoever passes the weights on has to say, and the terms of the training data may bind them"


def export(args: argparse.Namespace, form: Form) -> None:
    """Write what the options of launch/export.py ask for. UserError, and nothing written, for what cannot work."""
    if args.out.exists():
        raise UserError(f"{args.out} exists: name another --out, or remove it")
    folder = chosen(args)
    translator, found = load_chosen(folder, args.averaged, "cpu", direction=form.direction), opened(folder)
    if args.to == "hub":
        _hub(translator, found, args, form)
        return
    if args.sample:
        raise UserError(f"--sample is for the card of --to hub, and a file of --to {args.to} has none: leave it out")
    graph = Graph(translator.translation, form)
    log.info("recording the network, which takes a moment")
    content = FILES[args.to](translator.translation, graph, facts_of(found, graph, args.licence))
    with replacing(args.out) as file:
        file.write(content)
    print(f"{args.out}: {len(content) / 1e6:.1f} MB; takes {' and '.join(graph.inputs)}, {form.images}")


def _hub(translator: Translator, found: Checkpoint | Hub, args: argparse.Namespace, form: Form) -> None:
    if form != Form():
        raise UserError(
            "--to hub writes the weights as they are: leave out --direction, --precision, --uint8 and --size"
        )
    translation = translator.translation
    facts = {**about(found, args.licence), "directions": " and ".join(translation.directions),
             "sizes": str(translation.sizes)}  # fmt: skip
    picture = sample_picture(translator, found.folder, args.sample)
    with new_folder(args.out) as folder:
        write_hub(folder, translation, found.state["config"], facts)
        Image.fromarray(picture).save(folder / "sample.png")
        (folder / "README.md").write_text(model_card(facts, figures(found.folder)), encoding="utf-8")
    print(f"{args.out}: look at README.md, then for example: hf upload NAME/MODEL {args.out}")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to be filled, which gets this name once that is done; otherwise nothing is left of it."""
    draft = path.with_name(f"{TEMPORARY}{path.name}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        yield draft
        draft.rename(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): name another --out") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def about(found: Checkpoint | Hub, licence: str) -> dict[str, str]:
    """What whoever is handed the weights needs to know."""
    config = found.state["config"]
    return {
        "method": config["method.name"], "task": str(config.get("task") or found.state.get("task", "unknown")),
        "step": str(found.state.get("step", "unknown")), "licence": licence, "made_by": f"srunit {version('srunit')}",
    }  # fmt: skip


def facts_of(found: Checkpoint | Hub, graph: Graph, licence: str) -> dict[str, str]:
    """And of a file what it takes, as its metadata."""
    form, sizes = graph.form, graph.sizes
    facts = about(found, licence) | {
        "direction": form.direction, "precision": form.precision, "images": form.images,
        "normalisation": "in the file" if form.uint8 else "pixel / 127.5 - 1",
        "multiple": str(1 if form.uint8 else sizes.multiple), "smallest": str(graph.smallest),
    }  # fmt: skip
    if form.size:
        facts["size"] = "{}x{}".format(*form.size)
    if graph.drawn:
        shape = {"style": f"(batch, {graph.translation.code})", "noise": "(batch, 1, height, width)"}[graph.drawn]
        facts[graph.drawn] = f"float32 {shape}, drawn from N(0, 1) for each image; its mean is 0"
    return facts
