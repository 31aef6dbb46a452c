"""Several processes under torchrun: torch's DistributedDataParallel."""

import os
import socket
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group, which its functions would keep as a default
from torch import Tensor, nn
from torch.distributed import PrefixStore
from torch.nn.parallel import DistributedDataParallel

from infra.errors import OUTAGE, Stopped
from infra.signals import StopRequest
from trainer.engines.attempts import of_this_attempt
from trainer.engines.base import Engine, LossModule
from trainer.engines.faster import is_on
from trainer.engines.peers import SLOW, Peers
from trainer.methods.base import OptimiserSpec
from trainer.optim import OptimConfig

PATIENCE = timedelta(minutes=60)  # of ranks that wait for a rank 0 that draws or prepares data


class DdpEngine(Engine):
    kind = "ddp"
    _kept: dist.Store | None = None  # the launcher's, which outlives attempts; none where others have connected us
    _store: dist.Store | None = None  # of this attempt
    _own_variables: tuple[str, ...] = ()  # of the environment, set here where there is no launcher

    def _connect(self) -> None:
        self.reducers: dict[str, DistributedDataParallel] = {}  # beside `modules`, by the name of an optimiser
        if not dist.is_initialized():  # a launcher such as Ray Train has connected its processes already
            self._join()
        # Hosts agree by themselves: through the accelerators' group they would have to wait for these.
        alike = dist.get_backend() == "gloo"
        self._hosts = None if alike else dist.new_group(backend="gloo", timeout=PATIENCE)

    def _join(self) -> None:
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        self._own_variables = tuple(alone.keys() - os.environ.keys())
        os.environ |= alone | os.environ
        try:
            self._kept, rank, world_size = next(dist.rendezvous("env://", timeout=PATIENCE))
            self._store = of_this_attempt(self._kept, rank, world_size, PATIENCE)
            dist.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo",
                store=self._store, rank=rank, world_size=world_size, timeout=PATIENCE,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise Stopped(
                f"the {self.world_size} processes cannot reach each other ({error}): a machine is away, or the launcher's "
                "--master_addr, its number of nodes or its --master_port is wrong", OUTAGE,
            ) from None  # fmt: skip

    def _wrap(self, module: LossModule, spec: OptimiserSpec, optim: OptimConfig) -> nn.Module:
        return reducing(module)

    def _gradients_stay_here(self, name: str) -> AbstractContextManager:
        return self.modules[name].no_sync()  # type: ignore[operator]

    def mean(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values / self.world_size

    def any(self, flag: bool) -> bool:
        found = torch.tensor(float(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._hosts)
        return bool(found)

    def all_ranks(self, rows: Tensor) -> tuple[Tensor, int]:
        gathered = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(gathered, rows.detach().contiguous())
        return torch.cat(gathered), self.rank * rows.shape[0]

    def gather(self, value: Any) -> list[Any] | None:
        values = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, values, group=self._hosts)  # through the accelerators' the hosts would wait for these
        return values

    def broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def remember(self, name: str, value: str) -> str:
        return value if self._kept is None else self._kept.compare_set(f"kept/{name}", "", value).decode()

    def watch(self, stop: StopRequest) -> None:
        if self._store is not None and self.world_size > 1:
            # With a connection of its own, since others may wait on theirs.
            own = PrefixStore("peers", self._store).clone()  # type: ignore[attr-defined]
            # A loss that begins late is compiled in the middle of the run.
            longest = self.config.longest_step * (SLOW if is_on(self.config.compile, self.device) else 1)
            self.peers = Peers(own, self.rank, self.world_size, stop, silence=self.config.silence, longest=longest)
            self.peers.begin()

    def close(self) -> None:
        if self.peers:
            self.peers.leave()
        if dist.is_initialized():
            # Who lets go of a group last waits for its thread, which may need the GIL. Python gives that up meanwhile; a reducer
            # of DDP does not, and would wait for ever (pytorch issue 56297).
            for module in (*self.modules.values(), *self.reducers.values()):
                for name in ("reducer", "logger"):
                    vars(module).pop(name, None)
            dist.destroy_process_group()
        for name in self._own_variables:  # whatever this process starts later is no rank of this training
            os.environ.pop(name, None)


def reducing(module: LossModule) -> DistributedDataParallel:
    """The same, whose gradients become means over the ranks while the rest of the backward pass runs."""
    # Every network of an optimiser takes part in its losses. Buffers are constants (blur kernels), or batch norm's running
    # statistics, which no rank trains with.
    return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
