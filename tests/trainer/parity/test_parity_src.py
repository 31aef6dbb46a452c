"""Replay of recorded numbers of the published SRC: its losses, and whole training steps, in float64."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.runs.config import JobConfig, make_config
from tests.trainer.parity.changes import Changes, images
from tests.trainer.parity.recorded import Recording, assert_same, each
from tests.trainer.parity.replay import Pair, command_line
from trainer.draws import Draws
from trainer.engines import EngineConfig, make_engine
from trainer.losses import hard_negative_weights, hdce, relation_loss
from trainer.methods.base import StepContext
from trainer.methods.parts import relation
from trainer.methods.src import SrcConfig
from trainer.step import train_step

EPOCHS = 400  # of the recorded schedules


def config_of(options: dict[str, str], **others: Any) -> JobConfig:
    given: dict[str, Any] = {"method.name": "src", "method.identity": "dce_idt" in options}
    given |= {f"method.{ours}": float(options[theirs]) for theirs, ours in {
        "lambda_HDCE": "lambda_hdce", "lambda_SRC": "lambda_src", "HDCE_gamma": "gamma",
    }.items()}  # fmt: skip
    given["method.gamma_end"] = (
        float(options["HDCE_gamma_min"]) if "use_curriculum" in options else given["method.gamma"]
    )
    return make_config(given | others)


def gamma_of(tag: str) -> float:
    """Of a case such as gamma0.1, curriculum50_10_epoch100_of_400 or curriculum50_10_epoch201_step."""
    if tag.startswith("gamma"):
        return float(tag.removeprefix("gamma"))
    start, end, epoch, *rest = tag.removeprefix("curriculum").split("_")
    method = SrcConfig(gamma=float(start), gamma_end=float(end), gamma_step=0.5 if rest == ["step"] else 1.0)
    return method.gamma_at(int(epoch.removeprefix("epoch")) / EPOCHS)


def assert_same_hdce(recording: Recording, name: str, groups: int, gamma: float, temperature: float = 0.07) -> None:
    key, query = recording["k"].requires_grad_(), recording["q"].requires_grad_()
    losses = hdce(query, key, hard_negative_weights(key, groups, gamma), temperature)
    assert_same(losses, recording[name])
    grad_query, grad_key = torch.autograd.grad(losses.mean(), [query, key], allow_unused=True)
    assert_same(grad_query, recording[f"{name}_grad_q"])
    assert grad_key is None


@each("semantic_relation*.npz")
def test_hdce(recording: Recording) -> None:
    for tag in (key.removeprefix("weight_") for key in recording.keys if key.startswith("weight_")):
        assert_same(hard_negative_weights(recording["k"], 1, gamma_of(tag))[0], recording[f"weight_{tag}"])
        for name in [key for key in recording.keys if key.startswith(f"hdce_{tag}_T") and key[-1].isdigit()]:
            assert_same_hdce(recording, name, 1, gamma_of(tag), float(name.rpartition("_T")[2]))
    assert_same_hdce(recording, "hdce_noweight", 1, math.inf)
    assert_same_hdce(recording, "hdce_b2within", 2, 1.0)
    assert_same_hdce(recording, "hdce_b2all", 1, 1.0)


@each("semantic_relation*.npz")
def test_relation(recording: Recording) -> None:
    inputs = {"src": ("q", "k"), "src_unnormalised": ("src_unnormalised_in_q", "src_unnormalised_in_k")}
    for name, (q, k) in inputs.items():
        query, key = recording[q].requires_grad_(), recording[k].requires_grad_()
        loss = relation_loss(query, key, 1)
        assert_same(loss, recording[name])
        grad_query, grad_key = torch.autograd.grad(loss, [query, key], allow_unused=True)
        assert_same(grad_query, recording[f"{name}_grad_q"])
        assert grad_key is None


@dataclass(frozen=True)
class RecordedDraws(Draws):
    recording: Recording
    taps: tuple[int, ...]

    def stream(self, *name: int | str, device: Any = "cpu") -> Any:
        stream, kind, tap = name
        assert (stream, kind) == ("hdce", "ids")
        ids = self.recording[f"s{self.step}_ids{self.taps.index(int(tap))}"]
        return SimpleNamespace(permutation=lambda positions, count: ids)


@each("src_trace_*.npz", compact=False)
def test_training_steps(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    start, options = recording.beside("trace_init"), command_line(recording)
    sources, targets = images(recording, "real_A_u8"), images(recording, "real_B_u8")
    job = config_of(options, **{
        "method.patches": len(recording["s0_ids0"]), "method.head_dim": len(start["F/mlp_0.0.bias"]),
        "method.generator.ngf": len(start["G/model.1.bias"]), "method.discriminator.ndf": len(start["D/model.0.bias"]),
        "optim.global_batch": sources.shape[1],
    })  # fmt: skip
    assert isinstance(job.method, SrcConfig)
    method = job.method.build(seed=0, global_batch=job.optim.global_batch).double()
    networks = {"G": method.generator, "D": method.discriminator, "F": method.heads}
    for letter, network in networks.items():
        network.load_state_dict(start.under(f"{letter}/"))
        assert [name for name, _ in network.named_parameters()] == recording.plain(f"params/{letter}")
    changes = {letter: Changes(network) for letter, network in networks.items()}
    engine = make_engine(EngineConfig(kind="single", device="cpu", precision="fp32"))
    engine.prepare(method, job.optim)
    norms: dict[str, Tensor] = {}
    for phase, letters in ("discriminator", "D"), ("generator", "GF"):

        def note(*_: Any, letters: str = letters) -> None:
            for letter in letters:
                gradients = [torch.as_tensor(p.grad).flatten() for p in networks[letter].parameters()]
                norms[letter] = torch.cat(gradients).norm()

        engine.optimisers[phase].register_step_pre_hook(note)
    weights: list[Tensor] = []

    def noted(key: Tensor, groups: int, gamma: float) -> Tensor:
        weights.append(hard_negative_weights(key, groups, gamma)[0])
        return weights[-1][None]

    monkeypatch.setattr(relation, "hard_negative_weights", noted)

    for step, epoch in enumerate(recording.plain("epochs")):
        weights.clear()
        batch = Pair(sources[step], targets[step])
        context = StepContext(RecordedDraws(0, step, recording, job.method.taps), epoch / EPOCHS)
        with torch.no_grad():
            assert_same(method(batch, context).fake[:, :, ::4, ::4], recording[f"s{step}_fake_B_s4"], 1e-9)
        losses = train_step(method, engine, [batch], context)
        for name, value in recording.under(f"s{step}_loss_").items():
            assert_same(losses[name.replace("HDCE", "hDCE")], value, 1e-9)
        for tap in range(len(job.method.taps)):
            recorded = recording[f"s{step}_weight{tap}"]
            assert_same(
                weights[tap][: len(recorded)], recorded.double(), 2e-7 if recorded.dtype == torch.float32 else 1e-9
            )
        for letter in networks:
            assert_same(norms[letter], recording[f"s{step}_gradnorm_{letter}"], 1e-8)
            changes[letter].check(recording[f"s{step}_change/{letter}"])
