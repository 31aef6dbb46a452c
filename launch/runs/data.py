"""The data that a job trains on: what was named, what was prepared for its task, or the embedded street scenes."""

import hashlib
import logging
import os
from pathlib import Path

from infra.errors import UserError
from infra.storage import open_storage
from pipelines.manifest import MANIFEST, load_manifest
from pipelines.matching.match import load_facts
from pipelines.prepare import STREET_SIZE, Encoding, prepare
from pipelines.sources.drawn import street_scenes
from trainer.tasks import TASKS, prepare_command

log = logging.getLogger(__name__)

EMBEDDED_TASK = "gta2city"
EMBEDDED_ROOT = "data/street-scenes"


def find_data(task: str, root: str | None, before: str | None = None) -> str:
    """The data root of a job: the one named, else that of the run which goes on (before) if it is still there, else
    data/TASK, else (for gta2city) street scenes drawn on the spot."""
    if root is not None:
        return root
    if before is not None and _is_prepared(before):
        return before
    prepared = f"data/{task}"
    if (Path(prepared) / MANIFEST).exists():
        return prepared
    if task != EMBEDDED_TASK:
        raise UserError(
            f"there is no data for {task}: name it with --data, or get {TASKS[task].source} and prepare it with: "
            f"{prepare_command(task)}"
        )
    log.info("no --data given and none prepared in %s: using the embedded street scenes (%s)", prepared, EMBEDDED_ROOT)
    prepare(street_scenes(), open_storage(EMBEDDED_ROOT), Encoding(STREET_SIZE), workers=os.cpu_count() or 1)
    return EMBEDDED_ROOT


def _is_prepared(root: str) -> bool:
    try:
        open_storage(root).read(MANIFEST)
    except FileNotFoundError:
        return False
    return True


def data_identity(root: str, match: str | None = None) -> str:
    """SHA-256 of the manifest, which has the hash of every shard: the same data anywhere, or other data. match: the name of the
    match that is drawn from, whose hash is then part of it."""
    storage = open_storage(root)
    data = load_manifest(storage).sha256
    if match is None:
        return data
    return hashlib.sha256(f"{data} {load_facts(storage, match).sha256}".encode()).hexdigest()


def images_by_split(root: str) -> dict[str, int]:
    """{"train/source": 400, …}."""
    return {name: split.samples for name, split in load_manifest(open_storage(root)).splits.items()}
