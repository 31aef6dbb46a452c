"""The engine of one process, and the interface that all engines share: how gradients travel, and nothing else."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infra.config import option
from infra.devices import has_fast_bf16, keep_freed_memory
from infra.errors import UserError
from infra.signals import StopRequest
from trainer.engines.faster import SWITCH, use_compiler, use_triton
from trainer.engines.peers import Peers
from trainer.methods.base import Method, OptimiserSpec
from trainer.optim import OptimConfig, make_optimiser, read_rate_from_device

Loss = Callable[[], Tensor]
OptimiserState = dict[str, dict[str, Tensor]]


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    kind: str = option(
        "auto", "who carries the gradients; auto: by the launcher that started the program",
        flag="--engine", choices=("auto", "single", "ddp", "deepspeed"), resumable=True,
    )  # fmt: skip
    device: str = option("auto", "auto: a GPU where there is one", choices=("auto", "cpu", "cuda"), resumable=True)
    precision: str = option(
        "auto", "of activations; weights are always fp32; auto: bf16 where the hardware has it, else fp32",
        flag="--precision", choices=("auto", "fp32", "bf16", "fp16"),
    )  # fmt: skip
    memory_format: str = option(
        "channels_last", "layout of the weights; features have that of the images, which is channels-last",
        choices=("channels_last", "contiguous"), resumable=True,
    )  # fmt: skip
    tf32: bool = option(
        True, "on a GPU: let fp32 convolutions and products round their factors to 10 bits", resumable=True
    )
    compile: str = option(
        "auto", "have torch.compile fuse what lies between convolutions (takes minutes at the first start); auto: in the "
        "generators, encoders and discriminators of every method but SinCUT, on a GPU with Triton",
        choices=SWITCH, resumable=True, before="false",
    )  # fmt: skip
    graphs: bool = option(
        False, "one GPU: capture whole training steps as CUDA graphs, compiled or not, and replay them (not measured yet); on a "
        "CPU the same code runs, and nothing is captured", resumable=True,
    )  # fmt: skip
    triton: str = option(
        "auto", "instance norm of what is not compiled by this project's Triton kernels; auto: on a GPU with Triton",
        choices=SWITCH, resumable=True, before="false",
    )  # fmt: skip
    silence: float = option(
        30.0,
        "several ranks: seconds without a sign of life after which one counts as lost, and all end",
        resumable=True,
    )
    longest_step: float = option(
        45.0,
        "several ranks: seconds that a step may take, if none before took a tenth of that; the first two may take ten times "
        "as long, and with engine.compile all",
        resumable=True,
    )  # fmt: skip
    zero_stage: int = option(0, "DeepSpeed ZeRO stage: 1 spreads the optimiser state", choices=(0, 1), resumable=True)

    def __post_init__(self) -> None:
        if not (5 <= self.silence < math.inf and 1 <= self.longest_step < math.inf):
            raise UserError(f"engine.silence {self.silence:g} must be 5 seconds or more and engine.longest_step "
                            f"{self.longest_step:g} 1 or more: 30 and 45 are usual")  # fmt: skip
        if self.graphs and self.precision == "fp16":
            raise UserError(
                "engine.graphs cannot capture fp16, whose loss scaler decides on the host: give --precision bf16"
            )
        # ZeRO brings a loss scaler of its own, whose state no checkpoint of ours would hold.
        if self.zero_stage > 0 and self.precision == "fp16":
            raise UserError("ZeRO with fp16 is not supported: give --precision bf16, or --engine.zero-stage 0")


class LossModule(nn.Module):
    """The networks of one optimiser, as the module that DDP and DeepSpeed wrap.

    Its forward evaluates a loss that depends on these networks, however it comes about: the generators run once per
    step, before the discriminator's update, and their graph is used after it, so no wrapper can own that pass.
    """

    def __init__(self, networks: nn.ModuleDict) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, loss: Loss, moves: Sequence[str] | None = None) -> Tensor:
        """moves: see `Phase`. Networks that are not moved take part with nothing, since DDP waits for all gradients."""
        value = loss()
        for name, network in self.networks.items():
            if moves is not None and name not in moves:
                value = value + sum(0 * parameter.sum() for parameter in network.parameters())
        return value


class Engine:
    """One process, no communication. Subclasses carry gradients between processes.

    rank, local_rank, world_size: this process's place; device: where its networks are.
    """

    kind = "single"

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = _pick_device(config.device, self.local_rank)
        self.use_precision(resolve_precision(config.precision, self.device))
        self._check_used()
        if self.device.type == "cuda":
            _tune_cuda(config.tf32)
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(_threads_per_rank())
        # All by the name of an optimiser.
        self.specs: dict[str, OptimiserSpec] = {}
        self.modules: dict[str, nn.Module] = {}
        self.parameters: dict[str, dict[str, nn.Parameter]] = {}
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        self.scalers: dict[str, torch.amp.GradScaler] = {}
        self.halts = True  # whether after a gradient that is not finite no weight is changed any more
        self._halted = torch.zeros((), dtype=torch.bool, device=self.device)  # whether there was one
        self.peers: Peers | None = None
        self._connect()

    def _check_used(self) -> None:
        """UserError for what was asked for and would do nothing here."""
        config = self.config
        if config.zero_stage > 0 and self.kind != "deepspeed":
            raise UserError(f"--engine.zero-stage {config.zero_stage} needs DeepSpeed, and this is engine {self.kind}: "
                            "start with the deepspeed launcher, or leave it out")  # fmt: skip
        if config.triton == "true" and self.device.type != "cuda":
            raise UserError(f"--engine.triton true needs a GPU, and this run is on a {self.device.type}: leave it out")
        if config.graphs and self.kind != "single":
            raise UserError(f"--engine.graphs true captures the steps of one process, and this is engine {self.kind}: leave it "
                            "out, or start one process without a launcher")  # fmt: skip

    def _connect(self) -> None:
        """Join the other processes."""
        if self.world_size > 1:
            raise UserError(f"engine single cannot use {self.world_size} processes: leave out --engine, or start one")

    # ---- training -------------------------------------------------------------------------------------------------

    def prepare(self, method: Method[Any, Any], optim: OptimConfig) -> None:
        """Move a method's networks to the device and make its optimisers. All ranks must hold equal weights."""
        if self.config.graphs and not method.replayable:
            raise UserError(f"--engine.graphs true cannot capture steps of {type(method).__name__}, which cuts images elsewhere "
                            "in each of them: leave it out")  # fmt: skip
        method.to(self.device)
        self._lay_out(method)
        use_triton(method, self.config.triton, self.device)
        use_compiler(method, self.config.compile, self.device)
        for spec in method.optimisers:
            networks = method.networks(spec.name)
            self.specs[spec.name] = spec
            self.parameters[spec.name] = dict(networks.named_parameters())
            self.optimisers[spec.name] = make_optimiser(
                networks.parameters(), optim, weight_decay=spec.weight_decay, betas=spec.betas
            )
            if self.config.graphs:
                read_rate_from_device(self.optimisers[spec.name], self.device)
            self.scalers[spec.name] = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
            self.modules[spec.name] = self._wrap(LossModule(networks), spec, optim)
        self.set_learning_rate(optim.lr)

    def _lay_out(self, method: Method[Any, Any]) -> None:
        if self.config.memory_format == "channels_last":
            method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _wrap(self, module: LossModule, spec: OptimiserSpec, optim: OptimConfig) -> nn.Module:
        return module

    def use_precision(self, precision: str) -> None:
        """Compute in "fp32", "bf16" or "fp16" from now on; only before `prepare`."""
        self.dtype = PRECISIONS[precision]

    def watch(self, stop: StopRequest) -> None:
        """Watch the other ranks, and be watched, from now on until `close`."""

    def step(self, number: int) -> AbstractContextManager:
        """While the training step of that number is under way."""
        return self.peers.step(number) if self.peers else nullcontext()

    def autocast(self) -> AbstractContextManager:
        """The precision of everything that runs forward."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def update(self, name: str, losses: Iterable[Loss], count: int, moves: Sequence[str] | None = None) -> Tensor:
        """One step of an optimiser on the mean of `count` micro-batch losses (and over all ranks). moves: see `Phase`.

        Returns the L2 norm of the gradient before any clipping, a scalar on the device and the same on all ranks. If it is not
        finite, weights and the optimiser's state stay as they are; the host does not wait to know.
        """
        optimiser, scaler, clip = self.optimisers[name], self.scalers[name], self.specs[name].clip
        optimiser.zero_grad(set_to_none=True)
        for index, loss in enumerate(losses):
            with self._gradients_stay_here(name) if index < count - 1 else nullcontext():
                with self.autocast():
                    value = self.modules[name](loss, moves)
                scaler.scale(value / count).backward()
        self._drop_gradients(name, moves)
        scaler.unscale_(optimiser)
        norm = self._norm(name)
        if clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters[name].values(), clip, norm)
        self._guard(name, norm)
        scaler.step(optimiser)
        scaler.update()
        return norm

    def _norm(self, name: str) -> Tensor:
        gradients = [parameter.grad for parameter in self.parameters[name].values() if parameter.grad is not None]
        return nn.utils.get_total_norm(gradients).to(self.device)

    def _guard(self, name: str, norm: Tensor) -> None:
        """Have the optimiser's next step change nothing if this norm, or with `halts` one before, is not finite. In fp16 the
        loss scaler does so, and goes on with a smaller scale."""
        if self.scalers[name].is_enabled():
            return
        broken = ~norm.isfinite()
        if self.halts:
            broken = self._halted.logical_or_(broken)
        self._withhold(name, broken)

    def _withhold(self, name: str, broken: Tensor) -> None:
        """Have the optimiser's next step change nothing if this bool is true."""
        if self.device.type != "cpu":
            tell_fused(self.optimisers[name], broken)
        elif broken:  # an optimiser passes over weights without a gradient
            for parameter in self.parameters[name].values():
                parameter.grad = None

    def _drop_gradients(self, name: str, moves: Sequence[str] | None) -> None:
        """Those of networks that are not moved: an optimiser passes over weights without a gradient, decay and moments
        included."""
        for place, parameter in self.parameters[name].items():
            if moves is not None and place.partition(".")[0] not in moves:
                parameter.grad = None

    def _gradients_stay_here(self, name: str) -> AbstractContextManager:
        """While a micro-batch other than the last runs backward: no communication yet."""
        return nullcontext()

    def set_learning_rate(self, rate: float) -> None:
        """The run's; each optimiser takes its own factor of it."""
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                own = rate * self.specs[name].rate
                group["lr"] = group["lr"].fill_(own) if isinstance(group["lr"], Tensor) else own

    # ---- what travels between ranks, and into checkpoints -----------------------------------------------------------

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks."""
        return values

    def all_ranks(self, rows: Tensor) -> tuple[Tensor, int]:
        """Detached rows (n, c) of all ranks in rank order, and the first row of this rank."""
        return rows, 0

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, in rank order, on rank 0; None elsewhere."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, everywhere."""
        return value

    def remember(self, name: str, value: str) -> str:
        """The value that was first given for this name, also in an earlier attempt of the same launcher's (torchrun
        --max-restarts)."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank. The processes wait for each other here, and for no accelerator."""
        return flag

    def optimiser_state(self, name: str) -> OptimiserState:
        """The optimiser's state by parameter name: of Adam exp_avg, exp_avg_sq (both like the parameter) and step
        (scalar), of SGD momentum_buffer. Empty before its first step (fp16 may skip some) and without momentum. The
        tensors may be the optimiser's own. All ranks must call it; every rank gets the whole."""
        optimiser = self.optimisers[name]
        return {
            place: {key: value.detach() for key, value in optimiser.state[parameter].items()}
            for place, parameter in self.parameters[name].items()
            if parameter in optimiser.state
        }

    def load_optimiser_state(self, name: str, state: OptimiserState) -> None:
        optimiser = self.optimisers[name]
        for place, values in state.items():
            parameter = self.parameters[name][place]
            optimiser.state[parameter] = {
                key: _like(value, parameter) if key != "step" else _step(value, optimiser, self.device)
                for key, value in values.items()
            }

    def scaler_state(self) -> dict[str, Any]:
        return {name: scaler.state_dict() for name, scaler in self.scalers.items()}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        for name, scaler in self.scalers.items():
            if state.get(name):
                scaler.load_state_dict(state[name])

    def weights_loaded(self) -> None:
        """Called after weights were copied into the networks: engines that hold a second copy refresh it."""

    def close(self) -> None:
        """Leave the other processes."""


def tell_fused(optimiser: Any, broken: Tensor) -> None:
    """Where a fused optimiser looks, on the device, for whether its step is to change nothing."""
    optimiser.grad_scale, optimiser.found_inf = None, broken.float()


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    return torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(value)


def _step(value: Tensor, optimiser: torch.optim.Optimizer, device: torch.device) -> Tensor:
    # Adam keeps its step count on the CPU unless it is fused.
    return value.clone().to(device if optimiser.defaults.get("fused") else "cpu")


def local_ranks() -> int:
    """How many ranks run on this machine, as torchrun or the deepspeed launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def _threads_per_rank() -> int:
    """This machine's cores, shared out among its ranks: more threads than cores make every one of them wait."""
    return max(1, torch.get_num_threads() // local_ranks())


def _tune_cuda(tf32: bool) -> None:
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    # Not by `fp32_precision` of its convolutions: torch then refuses to answer questions about cuDNN as a whole.
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True  # a training meets few shapes, each of them often


def _pick_device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is visible: install a driver, or leave out --engine.device")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} of this machine has no GPU ({torch.cuda.device_count()} found): start fewer processes"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def resolve_precision(wanted: str, device: torch.device) -> str:
    """ "auto" as the precision that this device is best at."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if has_fast_bf16() else "fp32"
