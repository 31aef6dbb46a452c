"""Several processes under the `deepspeed` launcher, with ZeRO if asked for.

Traps that shape this file (DeepSpeed 0.19): two `backward` calls before a step give wrong gradients under ZeRO
unless DeepSpeed counts the accumulation itself; clipping is on by default; an optimiser named in its configuration
becomes AdamW; without ZeRO, gradients are added up only after the backward pass; parameters are broadcast as flat
bytes, which fails on channels-last weights, and ZeRO's flat buffers take contiguous gradients only.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from infra.errors import UserError
from trainer.engines import shared_memory
from trainer.engines.base import Loss, LossModule, OptimiserState, _like, local_ranks, tell_fused
from trainer.engines.ddp import DdpEngine, reducing
from trainer.methods.base import Method, OptimiserSpec
from trainer.optim import OptimConfig


class DeepSpeedEngine(DdpEngine):
    kind = "deepspeed"

    def _connect(self) -> None:
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)
        on_cpu = self.device.type == "cpu"
        if on_cpu:
            shared_memory.check_room(local_ranks())
        super()._connect()
        import deepspeed

        if on_cpu:
            shared_memory.build()
        deepspeed.init_distributed(verbose=False)  # finds the process group and adopts it
        if on_cpu:
            dist.barrier()
            shared_memory.unlink_buffer(self.rank)

    def prepare(self, method: Method[Any, Any], optim: OptimConfig) -> None:
        if self.config.zero_stage > 0 and any(phase.moves is not None for phase in method.phases):
            raise UserError("ZeRO keeps the weights of an optimiser as one, and this method has an update that moves some of "
                            "its networks alone: give --engine.zero-stage 0, or an option of the method without one")  # fmt: skip
        super().prepare(method, optim)
        if self.config.zero_stage == 0:
            super()._lay_out(method)
            if self.device.type == "cuda" and self.world_size > 1:
                self.reduce_meanwhile(method)

    def reduce_meanwhile(self, method: Method[Any, Any]) -> None:
        """Have DDP average the gradients during the backward pass: without ZeRO DeepSpeed does so after it, where an accelerator
        has nothing else to do. On a CPU DeepSpeed's own way through shared memory is the faster one."""
        for name in self.modules:
            engine: Any = self.modules[name]
            engine.enable_backward_allreduce = False
            self.reducers[name] = reducing(LossModule(method.networks(name)))

    def _gradients_stay_here(self, name: str) -> AbstractContextManager:
        return self.reducers[name].no_sync() if name in self.reducers else nullcontext()

    def _lay_out(self, method: Method[Any, Any]) -> None:
        """Not before DeepSpeed has broadcast the weights."""

    def _wrap(self, module: LossModule, spec: OptimiserSpec, optim: OptimConfig) -> nn.Module:
        import deepspeed

        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": optim.global_batch // (self.world_size * optim.accumulation),
            "gradient_accumulation_steps": optim.accumulation,
            "gradient_clipping": spec.clip or 0.0,
            "zero_optimization": {"stage": self.config.zero_stage},
            "zero_allow_untested_optimizer": True,  # torch's SGD, whose state is as plain as Adam's
            # bf16 needs no help: this engine's own autocast runs inside the loss. Only fp16 needs DeepSpeed's scaler.
            "torch_autocast": {"enabled": self.dtype == torch.float16, "dtype": "float16"},
        }
        wrapped, *_ = deepspeed.initialize(
            model=module, optimizer=self.optimisers[spec.name], config=settings, dist_init_required=False
        )
        if wrapped.torch_autocast_z0_gradscaler is not None:
            self.scalers[spec.name] = wrapped.torch_autocast_z0_gradscaler
        return wrapped

    def update(self, name: str, losses: Iterable[Loss], count: int, moves: Sequence[str] | None = None) -> Tensor:
        engine: Any = self.modules[name]
        norm = torch.zeros((), device=self.device)
        for index, loss in enumerate(losses):
            with self._gradients_stay_here(name) if index < count - 1 else nullcontext():
                if name in self.reducers:
                    value = engine(partial(self.reducers[name], partial(self._under_autocast, loss), moves))
                else:
                    value = engine(partial(self._under_autocast, loss), moves)
                engine.backward(value)  # divides by the number of micro-batches
            self._drop_gradients(name, moves)  # which DeepSpeed fills with zeros where there is none
            if index == count - 1:
                norm = self._norm(name)
                self._guard(name, norm)
            engine.step()  # acts on the last micro-batch only
        return norm

    def _norm(self, name: str) -> Tensor:
        if self.config.zero_stage == 0:
            if not (scaler := self.scalers[name]).is_enabled():
                return super()._norm(name)
            scale = scaler._get_scale_async()  # None before the first step; DeepSpeed itself unscales later
            return super()._norm(name) if scale is None else super()._norm(name) / scale
        # Each rank has the reduced gradients of its own share of the weights, and zeros that fill up its partition.
        zero: Any = self.modules[name].optimizer
        held = [gradient for group in zero.averaged_gradients.values() for gradient in group or ()]
        squares = nn.utils.get_total_norm(held).to(self.device).square()
        dist.all_reduce(squares)
        return squares.sqrt()

    def _withhold(self, name: str, broken: Tensor) -> None:
        if self.config.zero_stage == 0:
            super()._withhold(name, broken)
        elif self.optimisers[name].defaults.get("fused"):  # ZeRO hands the gradients over in its own step
            tell_fused(self.optimisers[name], broken)
        elif broken:  # SGD on a CPU: no such step, though momentum and weight decay still act
            zero: Any = self.modules[name].optimizer
            for group in zero.averaged_gradients.values():
                for gradient in group or ():
                    gradient.zero_()

    def _under_autocast(self, loss: Loss) -> Tensor:
        # Entered inside DeepSpeed's forward, since it switches a surrounding autocast off.
        with self.autocast():
            return loss()

    def optimiser_state(self, name: str) -> OptimiserState:
        if self.config.zero_stage == 0:
            return super().optimiser_state(name)
        from deepspeed.utils import safe_get_full_optimizer_state

        partitions = self._zero_state(name)
        if not partitions:
            return {}
        counts = {key: value.detach().cpu() for key, value in partitions[0].items() if _is_count(key)}
        spread = [key for key in partitions[0] if not _is_count(key)]
        return {
            place: {key: safe_get_full_optimizer_state(parameter, key).cpu() for key in spread}
            | {key: value.clone() for key, value in counts.items()}
            for place, parameter in self.parameters[name].items()
        }

    def load_optimiser_state(self, name: str, state: OptimiserState) -> None:
        if self.config.zero_stage == 0:
            return super().load_optimiser_state(name, state)
        from deepspeed.utils import safe_set_full_optimizer_state

        if not state:
            return
        self._make_zero_state(name)
        for place, parameter in self.parameters[name].items():
            for key, value in state[place].items():
                if not _is_count(key):
                    safe_set_full_optimizer_state(parameter, _like(value, parameter), key)
        any_parameter = next(iter(state.values()))
        for partition in self._zero_state(name):
            for key in filter(_is_count, partition):
                partition[key].copy_(any_parameter[key])

    def _make_zero_state(self, name: str) -> None:
        """Have the optimiser make its state on the flat partitions by a step at rate 0, which changes no weight (without
        gradients alone, weight decay would)."""
        self.set_learning_rate(0.0)
        zero: Any = self.modules[name].optimizer
        for partition in zero.single_partition_of_fp32_groups:
            partition.grad = torch.zeros_like(partition)
        self.optimisers[name].step()
        for partition in zero.single_partition_of_fp32_groups:
            partition.grad = None
        zero._lazy_init_hp_params_optimizer_state()

    def _zero_state(self, name: str) -> list[dict[str, Tensor]]:
        """The optimiser's state of the flat partitions that this rank holds."""
        return [held for held in self.optimisers[name].state.values() if held]

    def weights_loaded(self) -> None:
        if self.config.zero_stage == 0:
            return
        from deepspeed.utils import safe_set_full_fp32_param

        for parameters in self.parameters.values():
            for parameter in parameters.values():
                safe_set_full_fp32_param(parameter, parameter.detach())


def _is_count(key: str) -> bool:
    """Whether a part of an optimiser's state is one number for all weights and not one for each."""
    return key == "step"
