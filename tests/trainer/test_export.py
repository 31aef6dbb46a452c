"""Translations as files for other programs: what is in them, what they compute, and what is refused."""

import io
from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from infra.errors import UserError
from tests.trainer.exported import NETWORKS, translation
from tests.trainer.small import SMALL, method_config
from trainer.export.check import check
from trainer.export.graph import Form, Graph, record
from trainer.export.onnx import running, to_onnx
from trainer.export.program import FACTS, to_library, to_program
from trainer.networks import ResnetGenerator
from trainer.translation import OneGenerator, Translation
from trainer.translator import Translator

pytestmark = pytest.mark.slow


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def layers(module: torch.nn.Module) -> set[str]:
    """Of its networks, whether one way or both."""
    return {type(layer).__name__ for layer in module.modules()} - {"OneGenerator", "TwoGenerators"}


@pytest.mark.parametrize("method", SMALL)
def test_every_method_has_its_layers_among_the_networks_here(method: str) -> None:
    made = layers(method_config(method).translation())
    assert any(made <= layers(translation(name)) for name in NETWORKS)


# ---- ONNX -----------------------------------------------------------------------------------------------------------

FORMS = {
    "cut": Form(), "cyclegan": Form(direction="BtoA", uint8=True), "distancegan": Form(precision="fp16"), "munit": Form(),
    "drit": Form(), "sincut": Form(uint8=True), "semst": Form(size=(64, 96)),
}  # fmt: skip
DRAWN = {
    "munit": {"style": ["batch", 8]},
    "drit": {"style": ["batch", 8]},
    "sincut": {"noise": ["batch", 1, "height", "width"]},
}
ONE_EACH = {"Conv", "ConvTranspose", "Pad", "InstanceNormalization", "Relu", "Add", "Tanh"}


@pytest.mark.parametrize("name", FORMS)
def test_every_network_has_an_onnx_file(name: str) -> None:
    """Whose numbers the function itself compares, at three sizes."""
    made, form = translation(name), FORMS[name]
    content = to_onnx(made, Graph(made, form), {"method": name, "licence": "free"})
    model = onnx.load(io.BytesIO(content))
    onnx.checker.check_model(model)
    assert model.opset_import[0].version == 20 and not {node.domain for node in model.graph.node} - {""}
    assert {entry.key: entry.value for entry in model.metadata_props} == {"method": name, "licence": "free"}
    shapes = {
        each.name: [side.dim_param or side.dim_value for side in each.type.tensor_type.shape.dim]
        for each in (*model.graph.input, *model.graph.output)
    }
    sides = ["height", "width"] if form.size is None else [96, 64]
    images = ["batch", *sides, 3] if form.uint8 else ["batch", 3, *sides]
    assert shapes == {"image": images, **DRAWN.get(name, {}), "translation": images}
    if name == "cut":  # a layer is an operator, as other programs want it
        assert {node.op_type for node in model.graph.node} == ONE_EACH
    if name == "distancegan":
        types = onnx.TensorProto
        assert {each.type.tensor_type.elem_type for each in (*model.graph.input, *model.graph.output)} == {types.FLOAT}
        assert {each.data_type for each in model.graph.initializer if len(each.dims) == 4} == {types.FLOAT16}
    if name == "cyclegan":
        _takes_any_size(content, made)


def _takes_any_size(content: bytes, made: Translation) -> None:
    session = onnxruntime.InferenceSession(content)
    for size in ((40, 60), (41, 63), (9, 8)):
        images = np.stack([picture(*size, seed) for seed in range(2)])
        (found,) = session.run(None, {"image": images})
        assert found.dtype == np.uint8
        assert np.abs(found.astype(int) - Translator(made, direction="BtoA")(images)).max() <= 1
        assert np.abs(found.astype(int) - Translator(made)(images)).max() > 10


def test_a_file_that_cannot_be_run_here_is_refused() -> None:
    """As onnxruntime has no convolution in bf16 on a CPU."""
    half, shapes = onnx.TensorProto.BFLOAT16, {"x": (1, 3, 8, 8), "w": (3, 3, 1, 1), "y": (1, 3, 8, 8)}
    x, w, y = (onnx.helper.make_tensor_value_info(name, half, shape) for name, shape in shapes.items())
    graph = onnx.helper.make_graph([onnx.helper.make_node("Conv", ["x", "w"], ["y"])], "g", [x, w], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    made = translation("cut")
    with pytest.raises(UserError, match="onnxruntime cannot run the file here, so it cannot be checked"):
        running(model.SerializeToString(), Graph(made, Form()))


# ---- programs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "precision"), [("cut", "bf16"), ("drit-feature-wise", "fp32")])
def test_a_program_needs_torch_alone(name: str, precision: str) -> None:
    made = translation(name)
    graph = Graph(made, Form(precision=precision))
    content = to_program(made, graph, {"method": name})
    facts = {FACTS: ""}
    module = torch.export.load(io.BytesIO(content), extra_files=facts).module()
    assert facts[FACTS] == f'{{"method": "{name}"}}'
    assert module(*graph.sample(1, 68, 72)).shape == (1, 3, 72, 68)


def test_a_library_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    made = OneGenerator(ResnetGenerator(ngf=2, blocks=0)).eval()
    graph = Graph(made, Form())
    content = to_library(made, graph, {})
    assert len(content) > 10_000
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        UserError, match="AOTInductor needs a C.. compiler and there is none: install g.., or give --to torch"
    ):
        to_library(made, graph, {})


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_what_differs_from_the_network_is_refused() -> None:
    made = translation("cut")
    graph = Graph(made, Form())

    def faulty(by: float, at: int) -> None:
        def run(inputs: Sequence[Tensor]) -> Tensor:
            result = graph(*inputs).clone()
            result[..., :at, :] += by
            return result

        check(run, graph, made, "file")

    faulty(0.0, 64)
    faulty(1e-4, 1)
    for by, at in ((0.01, 1), (2e-4, 64), (float("nan"), 1)):
        with pytest.raises(
            UserError, match="the exported file differs from the network by .* levels of 255 on average"
        ):
            faulty(by, at)
    with pytest.raises(
        UserError, match=r"the exported file makes float32 \(1, 3, 63, 64\) of float32 \(1, 3, 64, 64\)"
    ):
        check(lambda inputs: graph(*inputs)[:, :, 1:], graph, made, "file")
    with pytest.raises(UserError, match="the exported file does not run on float32 .* .no such operator.: nothing was"):
        check(_broken, graph, made, "file")


def _broken(inputs: Sequence[Tensor]) -> Tensor:
    raise RuntimeError("no such\n operator")


@pytest.mark.parametrize(
    ("name", "form", "words"),
    [
        ("cut", Form(direction="BtoA"), "translates AtoB, not BtoA: choose one of these"),
        ("semst", Form(), "window by window, as many as an image has, .* give --size"),
        ("cut", Form(size=(66, 64)), "images of 66x64 do not fit this network: give --size with sides that are multiples of 4"),
        ("cut", Form(size=(4, 64), uint8=True), "images of 4x64 do not fit .* sides that are 5 or more"),
    ],
)  # fmt: skip
def test_a_form_that_a_network_does_not_have_is_named(name: str, form: Form, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Graph(translation(name), form)


def test_a_network_that_looks_at_numbers_is_refused() -> None:
    class Choosy(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    made = translation("cut")
    made.generator = Choosy()
    graph = Graph.__new__(Graph)
    torch.nn.Module.__init__(graph)
    graph.__dict__.update(form=Form(), dtype=torch.float32, sizes=translation("cut").sizes)
    graph.translation = made
    with pytest.raises(UserError, match="cannot be recorded as a graph of operators"):
        record(graph)


# ---- the form for bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(64, 96), (63, 94)])
def test_the_form_for_bytes_is_what_translators_do(name: str, size: tuple[int, int]) -> None:
    made = translation(name)
    graph = Graph(made, Form(uint8=True, size=size[::-1]))
    images = np.stack([picture(*size, seed) for seed in range(2)])
    translator = Translator(made)
    if graph.drawn:
        made.code_shape = lambda height, width: None  # type: ignore[method-assign]  # the mean, which is 0
        zeros = torch.zeros(2, *([8] if graph.drawn == "style" else [1, *size]))
    with torch.no_grad():
        found = graph(torch.from_numpy(images), *([zeros] if graph.drawn else [])).numpy()
    assert np.abs(found.astype(int) - translator(images)).max() <= 1 and found.std() > 5
