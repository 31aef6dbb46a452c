"""ONNX files, by torch's exporter, checked with onnxruntime."""

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from infra.errors import UserError, first_line
from trainer.export.check import Run, check
from trainer.export.graph import Graph, record
from trainer.translation import Translation

OPSET = 20


def to_onnx(translation: Translation, graph: Graph, facts: Mapping[str, str]) -> bytes:
    """An ONNX file whose inputs are `graph.inputs` and whose output is "translation"; facts: its metadata.

    UserError where onnxruntime cannot run it here, so that it cannot be checked, or finds other numbers than the network.
    """
    try:
        import onnxscript  # noqa: F401  # what torch's exporter is made with
    except ImportError:
        raise UserError("ONNX files need the package onnxscript: pip install -c constraints.txt onnxscript") from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of packages that are not needed
    recorded = record(graph)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # the exporter tells its steps
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            recorded, input_names=graph.inputs, output_names=("translation",), opset_version=OPSET, dynamo=True,
            external_data=False, verbose=False,
        )  # fmt: skip
    assert program is not None
    _name_sides(program, graph)
    program.model.metadata_props.update(facts)
    content = program.model_proto.SerializeToString()
    check(running(content, graph), graph, translation, "ONNX file")
    return content


def _name_sides(program: torch.onnx.ONNXProgram, graph: Graph) -> None:
    """Inputs and output have one batch, height and width, which the exporter calls what it calculates them by."""
    free = graph.form.size is None
    places = {"image": 1 if graph.form.uint8 else 2, "translation": 1 if graph.form.uint8 else 2, "noise": 2}
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        shape = value.shape
        assert shape is not None and value.name is not None
        shape[0] = "batch"
        if free and value.name in places:
            shape[places[value.name]], shape[places[value.name] + 1] = "height", "width"


def running(content: bytes, graph: Graph) -> Run:
    """What onnxruntime computes with an ONNX file. UserError for one that it cannot run."""
    import onnxruntime  # takes a moment to import

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise UserError(f"onnxruntime cannot run the file here, so it cannot be checked ({first_line(error)}): "
                        "nothing was written; give --precision fp32 or fp16") from error  # fmt: skip

    def run(inputs: Sequence[Tensor]) -> Tensor:
        given = {name: each.numpy() for name, each in zip(graph.inputs, inputs, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return run
