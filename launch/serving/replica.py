"""Replicas on Ray Serve, and the handing of jobs to them."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from ray import serve
from ray.exceptions import OutOfMemoryError, RayActorError

from infra.devices import keep_freed_memory
from infra.errors import UserError
from launch.serving.placement import Placement
from launch.serving.work import Answer, Job, Work, refusal
from trainer.segmentation.load import load_segmenter
from trainer.translator import Translator

ATTEMPTS = 3  # a file that ends every replica that works at it is not to end them all


class Replica:
    """translator: on the CPU, or a reference to it. segmenter: the path of one, which every machine sees, or None."""

    def __init__(self, translator: Any, segmenter: str | None, max_pixels: int, placement: Placement) -> None:
        # All arithmetic has one thread of its own, so that the replica goes on to say that it lives. With a second one, OpenMP
        # would have more threads than there are CPUs, and let them sleep between operators.
        torch.set_num_threads(1)
        self._thread = ThreadPoolExecutor(1, "work", torch.set_num_threads, (max(1, int(placement.cpus)),))
        self.work = self._thread.submit(_work, translator, segmenter, max_pixels, bool(placement.gpus)).result()
        self.together.set_max_batch_size(placement.batch)  # type: ignore[attr-defined]
        self.together.set_batch_wait_timeout_s(placement.wait_s)  # type: ignore[attr-defined]

    @serve.batch
    async def together(self, jobs: list[Job]) -> list[Answer]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.work, jobs)

    async def __call__(self, job: Job) -> Answer:
        return await self.together(job)


def _work(translator: Any, segmenter: str | None, max_pixels: int, on_gpu: bool) -> Work:
    import ray

    keep_freed_memory()
    translator = ray.get(translator) if isinstance(translator, ray.ObjectRef) else translator
    device = torch.device("cuda" if on_gpu else "cpu")
    translator = Translator(
        translator.translation.to(device), device, seed=translator.seed, direction=translator.direction
    )
    return Work(translator, max_pixels, load_segmenter(Path(segmenter), device) if segmenter else None)


def deploy(
    name: str, placement: Placement, translator: Translator, segmenter: str | None, max_pixels: int, queue: int
) -> Any:
    """Start the replicas on the Ray that is connected, and wait until they are ready; a handle of them. queue: jobs that one of
    them may have."""
    import ray

    deployment = serve.deployment(
        name="translation",
        num_replicas=placement.replicas,
        max_ongoing_requests=queue,  # of what is over, Ray would ask again ever more seldom
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": placement.cpus, "num_gpus": placement.gpus},
    )(Replica)
    serve.start(proxy_location="Disabled")
    application = deployment.bind(ray.put(translator), segmenter, max_pixels, placement)
    return serve.run(application, name=name, route_prefix=None)


def ready_replicas(name: str) -> int:
    application = serve.status().applications.get(name)
    if application is None:
        return 0
    states = application.deployments["translation"].replica_states
    return sum(count for state, count in states.items() if getattr(state, "value", state) == "RUNNING")


def withdraw(name: str) -> None:
    """End the replicas; others' on the same Ray go on."""
    serve.delete(name)


class Sender:
    """Has jobs done by replicas. A job whose replica is lost is done by another, since it changes nothing but its answer.

    on_retry: called for each that is done again.
    """

    def __init__(self, handle: Any, on_retry: Callable[[], None]) -> None:
        self.handle, self.on_retry = handle, on_retry

    async def __call__(self, job: Job) -> Answer:
        for _ in range(ATTEMPTS):
            try:
                return await self.handle.remote(job)
            except (RayActorError, OutOfMemoryError):
                self.on_retry()
        return refusal(UserError(f"this image ended {ATTEMPTS} replicas one after the other: send a smaller one"), 500)
