"""Programs for torch alone: torch.export's .pt2, and libraries that AOTInductor compiles for this machine's device."""

import io
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from infra.devices import usual_device
from infra.errors import UserError, first_line
from trainer.export.check import check
from trainer.export.graph import Graph, record
from trainer.translation import Translation

FACTS = "srunit.json"  # the file of facts in a .pt2


def to_program(translation: Translation, graph: Graph, facts: Mapping[str, str]) -> bytes:
    """A file for `torch.export.load`, whose `.module()` takes `graph.inputs` and gives the translation.

    facts: JSON of them is kept in the file. UserError where it finds other numbers than the network.
    """
    buffer = io.BytesIO()
    torch.export.save(record(graph), buffer, extra_files={FACTS: json.dumps(dict(facts))})
    module = torch.export.load(io.BytesIO(buffer.getvalue())).module()

    def run(inputs: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            return module(*inputs)

    check(run, graph, translation, "program")
    return buffer.getvalue()


def to_library(translation: Translation, graph: Graph, facts: Mapping[str, str]) -> bytes:
    """A package for `torch._inductor.aoti_load_package`, compiled for the GPU where there is one, else for this CPU.

    UserError where there is no compiler, and where it finds other numbers than the network.
    """
    if not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError("AOTInductor needs a C++ compiler and there is none: install g++, or give --to torch")
    device = usual_device()
    recorded = move_to_device_pass(record(graph), device)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.pt2"
        try:
            torch._inductor.aoti_compile_and_package(
                recorded,
                package_path=str(path),
                inductor_configs={
                    "aot_inductor.metadata": dict(facts),
                    "aot_inductor.precompile_headers": False,  # they pay for many libraries
                },
            )
            library = torch._inductor.aoti_load_package(str(path))
        except Exception as error:  # of many kinds
            raise UserError(
                f"AOTInductor cannot compile this network ({first_line(error)}): give --to torch"
            ) from error

        def run(inputs: Sequence[Tensor]) -> Tensor:
            return library(*(each.to(device) for each in inputs)).cpu()

        check(run, graph, translation, "library")
        return path.read_bytes()
