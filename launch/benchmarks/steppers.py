"""The processes of `launch.benchmarks.one_step` from outside: started, asked in turn, ended."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from infra.errors import UserError
from launch.benchmarks import one_step

QUIET = {"KINETO_LOG_LEVEL": "99"}  # the profiler prints when it starts and stops


class OutOfMemory(Exception):
    """The combination does not fit."""


class Stepper:
    """One process, or the ranks of one training. All of them stay alive between their turns, and wait."""

    def __init__(
        self,
        name: str,
        program: str,
        options: Mapping[str, Any],
        *,
        cores: Sequence[int | None] = (None,),
        environments: Sequence[Mapping[str, str]] = ({},),
    ) -> None:
        """name: for people. options: of the configuration tree, flat. cores, environments: the only core of each
        rank's process (None: all), and its environment variables."""
        self.name = name
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", one_step.__name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**QUIET, **os.environ, **environment},
            )
            for environment in environments
        ]  # fmt: skip
        for process, core in zip(self.processes, cores, strict=True):
            self._send(process, {"program": program, "options": dict(options), "core": core})

    def __enter__(self) -> "Stepper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            assert process.stdin
            with suppress(BrokenPipeError):
                process.stdin.close()  # the end of its work
        for process in self.processes:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Every rank does it; the answer of rank 0. Raises OutOfMemory, and UserError if a process has ended."""
        self.tell(**request)
        return self.hear()

    def tell(self, **request: Any) -> None:
        for process in self.processes:
            self._send(process, request)

    def hear(self) -> dict[str, Any]:
        answers = []
        for process in self.processes:
            assert process.stdout
            line = process.stdout.readline()
            if not line:
                raise UserError(
                    f"the process of {self.name!r} ended early (its message is above): leave this combination out"
                )
            answers.append(json.loads(line))
        if "failed" in answers[0]:
            raise OutOfMemory(self.name)
        return answers[0]

    def _send(self, process: subprocess.Popen[str], message: Mapping[str, Any]) -> None:
        assert process.stdin
        with suppress(BrokenPipeError):  # `hear` says that it has ended
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
