"""Commands of this project as cluster files have them, parsed by the parsers that they reach."""

import os
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed.launcher import runner
from torch.distributed.run import parse_args, parse_min_max_nnodes

from launch.alive import parser as alive_parser
from launch.prepare import parser as prepare_parser
from launch.runs.config import parse_arguments as parse_training
from tuning.config import parse_arguments as parse_search

REPOSITORY = Path(__file__).parents[2]
CLUSTERS = REPOSITORY / "infra" / "clusters"
PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "launch/train.py": parse_training,
    "launch/alive.py": lambda arguments: alive_parser().parse_args(arguments),
    "launch/prepare.py": lambda arguments: prepare_parser().parse_args(arguments),
    "tuning/search.py": parse_search,
}


def parse(command: Sequence[str], variables: Mapping[str, str] | None = None) -> list[Any]:
    """What each parser that a command goes through makes of it, the launcher's first. variables: the environment of the command.
    SystemExit or UserError for what one of them refuses."""
    program, *arguments = command
    if program == "exec":
        return parse(arguments, variables)
    if program == "deepspeed":
        args = runner.parse_args(arguments)
        return [args, *parse(["python", args.user_script, *args.user_args])]
    if program == "torchrun":
        return parse(["python", "launch/torchrun.py", *arguments], variables)
    assert program == "python", command
    script, *arguments = arguments
    assert (REPOSITORY / script).is_file(), command
    if script == "launch/torchrun.py":
        with only_torchrun_variables(variables or {}):
            args = parse_args(arguments)
        parse_min_max_nnodes(args.nnodes)
        return [args, *parse(["python", args.training_script, *args.training_script_args])]
    return [PARSERS[script](arguments)]


@contextmanager
def only_torchrun_variables(variables: Mapping[str, str]) -> Iterator[None]:
    """The PET_* variables of a command, and none of this process's own."""
    before = {name: value for name, value in os.environ.items() if name.startswith("PET_")}
    for name in before:
        del os.environ[name]
    own = {name: value for name, value in variables.items() if name.startswith("PET_")}
    os.environ |= own
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]
        os.environ |= before


def run_shell(
    script: Path | str, folder: Path, programs: Mapping[str, str], **variables: str
) -> tuple[int, list[list[str]]]:
    """Run a shell script, of a file or as text, in an otherwise empty folder in which .venv/bin/activate is empty and these
    programs are replaced by shell texts; returns the exit code and every call of them, the program's name first."""
    stubs, calls = folder / "stubs", folder / "calls"
    stubs.mkdir()
    activate = folder / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    for name, text in programs.items():
        stub = stubs / name
        stub.write_text(f'#!/bin/bash\nprintf "%q " {name} "$@" >> {calls}; echo >> {calls}\n{text}\n')
        stub.chmod(0o755)
    path = f"{stubs}{os.pathsep}{os.environ['PATH']}"
    source = [str(script)] if isinstance(script, Path) else ["-c", script]
    code = subprocess.run(["bash", *source], cwd=folder, env={"PATH": path, **variables}, timeout=60).returncode
    return code, [shlex.split(line) for line in calls.read_text().splitlines()] if calls.exists() else []
