"""Where replicas are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """replicas: how many. cpus, gpus: of each. batch: the most images that a replica takes together, for
    which it waits wait_s."""

    replicas: int
    cpus: float
    gpus: float
    batch: int
    wait_s: float
