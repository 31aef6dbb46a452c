"""The arms of the flipping benchmark: named sets of options of `launch/train.py`, from one YAML file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infra.config import flat_items, load_yaml, read_yaml
from infra.errors import UserError
from launch.runs.config import JobConfig, make_config
from pipelines.matching.match import WAYS

SEGMENTER = "S"  # in options: the source-side segmenter of the arm's round
MATCH = "data.match"  # in options: the way of matching, one of WAYS, instead of a name
ARMS = Path(__file__).parent / "flipping-arms.yaml"
FIELDS: dict[str, type] = {"title": str, "options": dict, "rounds": int}


@dataclass(frozen=True)
class Arm:
    """options: flat. rounds: whose segmenter SEGMENTER stands for; that of round 0 is trained on the sources alone, the others on
    translations of the round before (launch/rounds.py)."""

    name: str
    title: str
    options: Mapping[str, Any]
    rounds: int = 0

    @property
    def way(self) -> str | None:
        """In which target crops are matched, if they are."""
        return self.options.get(MATCH)

    @property
    def uses_segmenter(self) -> bool:
        return self.way == "segmenter" or SEGMENTER in self.options.values()

    def config(self, common: Path, options: Mapping[str, Any]) -> JobConfig:
        """What a training of this arm is: the file of common options < these. UserError names the arm."""
        try:
            return make_config(read_yaml(common), options)
        except UserError as error:
            raise UserError(f"the arm {self.name}: {error}") from None


def read_arms(file: Path = ARMS) -> dict[str, Arm]:
    """All arms by name, in the order of the file. UserError for a file that is no such list."""
    try:
        tree = load_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the arms {file} ({error.strerror}): check the path") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"{file} is not valid YAML: correct it") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file} holds no arms: it should have lines such as 'cut: {{title: CUT, options: {{}}}}'")
    return {str(name): _arm(file, str(name), fields) for name, fields in tree.items()}


def _arm(file: Path, name: str, fields: Any) -> Arm:
    form = "{title: TEXT, options: {…}, rounds: N}, of which rounds may be absent"
    if not isinstance(fields, dict) or {"title", "options"} - fields.keys():
        raise UserError(f"the arm {name} of {file} is no {form}: correct it")
    for field, value in fields.items():
        if not isinstance(value, FIELDS.get(field, ())):
            raise UserError(f"the arm {name} of {file} has {field} = {value!r}: give {form}")
    way = dict(flat_items(fields["options"])).get(MATCH)
    if way is not None and way not in WAYS:
        raise UserError(f"the arm {name} of {file} has {MATCH} = {way!r}: give the way of matching, {', '.join(WAYS)}")
    arm = Arm(name, fields["title"], dict(flat_items(fields["options"])), fields.get("rounds", 0))
    if arm.rounds < 0:
        raise UserError(f"the arm {name} of {file} has rounds = {arm.rounds}: give 0 or more")
    return arm


def choose(arms: Mapping[str, Arm], names: Sequence[str]) -> list[Arm]:
    """Those named, in this order. UserError for a name that no arm has, or that is given twice."""
    for name in names:
        if name not in arms:
            raise UserError(f"there is no arm {name}: choose among {', '.join(arms)}, or add it to {ARMS}")
    if len(set(names)) < len(names):
        raise UserError(f"the arms {' '.join(names)} name one twice: name each once")
    return [arms[name] for name in names]
