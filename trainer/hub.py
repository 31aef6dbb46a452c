"""A translation in the layout of the Hugging Face Hub: config.json and model.safetensors in a folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from infra.config import FORMAT, check_format
from infra.disk import flush
from infra.errors import UserError, first_line
from infra.shapes import read_shape
from trainer.checkpoint import fill
from trainer.translation import Translation

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class _Config:
    """Of config.json. library_name: by which the Hub knows whose it is. config: the options that the networks are built by, flat,
    as in a checkpoint. facts: for people."""

    format: int
    library_name: str
    config: dict[str, Any]
    facts: dict[str, str]


def is_hub(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def write_hub(folder: Path, translation: Translation, config: Mapping[str, Any], facts: Mapping[str, str]) -> None:
    """Into an empty folder. config: the checkpoint's."""
    needed = {name: value for name, value in config.items() if name.startswith(("method.", "seed"))}
    about = {"format": FORMAT, "library_name": "srunit", "config": needed, "facts": dict(facts)}
    (folder / CONFIG).write_text(json.dumps(about, indent=1) + "\n")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in translation.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for name in (CONFIG, WEIGHTS):
        flush(folder / name)


class Hub:
    """Such a folder, as `trainer.checkpoint.Checkpoint` is used. UserError for one that is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            read = read_shape(_Config, (folder / CONFIG).read_bytes())
            self._tensors = load_file(folder / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder} is damaged ({first_line(error)}): fetch it again") from None
        check_format(str(folder), read.format)
        self.state: dict[str, Any] = {"config": read.config, **read.facts}

    def averaged(self, stem: str) -> str:
        return stem

    def load_into(self, network: nn.Module, stem: str) -> None:
        """Copy one network's weights in. UserError if it has another architecture."""
        start = f"{stem}."
        tensors = {name.removeprefix(start): value for name, value in self._tensors.items() if name.startswith(start)}
        fill(network, tensors, f"{self.folder} holds another architecture: {stem}")
