"""Where trials run: a Ray started here or one that is there already, and what each trial gets of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from infra import ray_cluster
from infra.errors import UserError
from infra.ray_cluster import Machine
from tuning.config import SearchConfig

# Of Ray and the trials. Trials write into the folders that they are given.
ENVIRONMENT = {
    **ray_cluster.ENVIRONMENT,
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # less than a trial takes to begin: a kill loses none
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass(frozen=True)
class Share:
    """What each rank of a trial gets, and how many trials run at once."""

    ranks: int
    cpus: float
    gpus: float
    concurrent: int


def share_out(search: SearchConfig, machines: Sequence[Machine]) -> Share:
    """UserError if not one trial finds room. CPUs beyond one a rank are given where --max-concurrent leaves them over
    and no GPU does the work."""
    cpus, gpus = sum(m.cpus for m in machines), sum(m.gpus for m in machines)
    ranks = search.ranks_per_trial
    wanted = search.gpus_per_trial if search.gpus_per_trial is not None else ranks * min(gpus, 1)
    per_rank = wanted / ranks
    if wanted > gpus:
        raise UserError(f"{wanted:g} GPUs per trial, {gpus:g} found: give a lower --gpus-per-trial, 0 for the CPU")
    if per_rank > max(m.gpus for m in machines):
        raise UserError(f"{per_rank:g} GPUs per rank are more than any machine has: give a lower --gpus-per-trial")
    if per_rank > 1 or (per_rank % 1 and ranks > 1):
        raise UserError(
            f"{wanted:g} GPUs for {ranks} ranks: give one GPU to each rank, or less than one to a single rank"
        )
    if ranks > cpus:
        raise UserError(f"{ranks} ranks per trial, {cpus:g} CPUs found: give a lower --ranks-per-trial")
    room = int(cpus // ranks) if not wanted else min(int(cpus // ranks), int(gpus / wanted + 1e-9))
    concurrent = min(room, search.max_concurrent or room)
    each = 1.0 if wanted else float(max(1, min(m.cpus for m in machines) // (concurrent * ranks)))
    return Share(ranks, each if search.max_concurrent else 1.0, per_rank, concurrent)


@contextmanager
def connected(search: SearchConfig) -> Iterator[list[Machine]]:
    """With Ray running, and the machines that it has. UserError for a cluster that does not answer."""
    lost = "continue the search with --resume"
    with ray_cluster.connected(search.address, lost=lost, environment=ENVIRONMENT, dashboard=search.dashboard) as found:
        yield found
