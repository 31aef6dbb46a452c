"""The files for clusters: each is what its system takes, and every command in them is one that the program takes."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from deepspeed.launcher.runner import fetch_hostfile
from kubeflow_trainer_api import models

from launch.torchrun import exit_code
from tests.infra.cluster_commands import CLUSTERS, REPOSITORY, parse, run_shell

KUBERNETES, COMPOSE = CLUSTERS / "kubernetes", CLUSTERS / "compose"
SBATCH = CLUSTERS / "slurm" / "train.sbatch"
PAGES = [*(path for path in CLUSTERS.rglob("*") if path.is_file()), REPOSITORY / "docs" / "clusters.md"]


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def validate(resource: dict[str, Any]) -> None:
    """Against the schemas of Kubernetes; a name that they do not know is an error."""
    kubernetes_validate.validate(resource, "1.37", strict=True)


def validate_pod(template: dict[str, Any]) -> None:
    validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]})


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}


def restarts(policy: dict[str, Any], code: int) -> bool:
    """Whether the rules of a podFailurePolicy start a pod again that ended with an exit code."""
    for rule in policy["rules"]:
        if "onExitCodes" in rule:
            values, operator = rule["onExitCodes"]["values"], rule["onExitCodes"]["operator"]
            if (code in values) == (operator == "In"):
                return bool(rule["action"] != "FailJob")
    return True


# ---- Kubernetes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["service", "runs", "job"])
def test_kubernetes_takes_the_file(name: str) -> None:
    for resource in documents(KUBERNETES / "base" / f"{name}.yaml"):
        validate(resource)


def test_the_pods_of_the_job_find_each_other() -> None:
    (job,), (service,) = (documents(KUBERNETES / "base" / f"{name}.yaml") for name in ("job", "service"))
    check_job(job)
    name, spec = job["metadata"]["name"], job["spec"]["template"]["spec"]
    environment = variables(spec["containers"][0])
    port = service["spec"]["ports"][0]["port"]
    assert environment["PET_RDZV_ENDPOINT"] == f"{name}-0.{service['metadata']['name']}:{port}"
    assert spec["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert service["spec"]["clusterIP"] == "None"


def check_job(job: dict[str, Any]) -> None:
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    launcher, config = parse([*container["command"], *container["args"]], variables(container))
    assert spec["completions"] == spec["parallelism"] == int(launcher.nnodes)
    ranks = int(launcher.nnodes) * int(container["resources"]["limits"].get("nvidia.com/gpu", 1))
    assert config.optim.global_batch % ranks == 0
    assert [restarts(spec["podFailurePolicy"], code) for code in (75, 143, 137, 2, 3)] == [True] * 3 + [False] * 2
    check_probe(container, config)


def check_probe(container: dict[str, Any], config: Any) -> None:
    """The liveness probe looks at the run that is trained; one that ends a pod lets it start again."""
    probe = container["livenessProbe"]
    (asked,) = parse(probe["exec"]["command"])
    assert str(asked.run) == config.run_dir and probe["periodSeconds"] >= probe["timeoutSeconds"] >= 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "nodes", "gpus"), [("base", 2, "8"), ("overlays/eight-nodes", 8, "8"), ("overlays/cpu", 2, None)]
)
def test_kustomize_makes_what_kubernetes_takes(folder: str, nodes: int, gpus: str | None) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kustomize is part of kubectl, which is not installed here")
    made = subprocess.run(["kubectl", "kustomize", KUBERNETES / folder], capture_output=True, text=True, check=True)
    resources = {resource["kind"]: resource for resource in yaml.safe_load_all(made.stdout)}
    assert resources.keys() == {"Service", "PersistentVolumeClaim", "Job"}
    for resource in resources.values():
        validate(resource)
    check_job(resources["Job"])
    assert resources["Job"]["spec"]["completions"] == nodes
    (container,) = resources["Job"]["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus
    assert container["image"] == "registry.example.com/srunit:0.1.0"


def test_a_misspelt_name_is_noticed() -> None:
    (job,) = documents(KUBERNETES / "base" / "job.yaml")
    job["spec"]["podFailurePolicies"] = job["spec"].pop("podFailurePolicy")
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(job)


# ---- operators of Kubernetes ------------------------------------------------------------------------------------------


def test_kubeflow_takes_the_runtime_and_the_job() -> None:
    kinds = {"TrainJob": models.TrainerV1alpha1TrainJob, "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime}
    runtime, job = documents(CLUSTERS / "kubeflow" / "trainjob.yaml")
    for resource in (runtime, job):
        read = kinds[resource["kind"]].from_dict(resource)
        assert read and read.to_dict() == resource  # what it does not know it drops
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]

    jobs = runtime["spec"]["template"]["spec"]
    (node,) = jobs["replicatedJobs"]
    validate_pod(node["template"]["spec"]["template"])
    validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, "spec": node["template"]["spec"]})
    policy = node["template"]["spec"]["podFailurePolicy"]
    assert [restarts(policy, code) for code in (75, 143, 2, 3)] == [True, True, False, False]
    # A Job that its podFailurePolicy ended has this reason; it ends the set, and any other starts it again.
    assert [rule["onJobFailureReasons"] for rule in jobs["failurePolicy"]["rules"]] == [["PodFailurePolicy"]]

    # Trainer sets these; of a node's processes "auto" is as many as it has GPUs.
    places = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "auto", "PET_MASTER_PORT": "29500"}
    trainer = job["spec"]["trainer"]
    launcher, config = parse([*trainer["command"], *trainer["args"]], {**places, "PET_MASTER_ADDR": "node-0-0"})
    assert (launcher.nnodes, launcher.node_rank, launcher.master_addr) == ("2", 1, "node-0-0")
    assert config.optim.global_batch % (2 * int(trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"])) == 0
    (container,) = node["template"]["spec"]["template"]["spec"]["containers"]
    check_probe(container, config)


def test_the_ray_job_has_pods_that_kubernetes_takes_and_a_search_that_starts() -> None:
    (job,) = documents(CLUSTERS / "ray" / "rayjob.yaml")
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        validate_pod(group["template"])
    (request,) = parse(shlex.split(job["spec"]["entrypoint"]))
    assert request.search.address == "auto"
    assert f"ray=={cluster['rayVersion']}" in (REPOSITORY / "constraints.txt").read_text().splitlines()


# ---- Compose ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compose_takes_the_files() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, *sorted(COMPOSE.glob("*.yaml"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_compose_starts_parses_and_fits_together() -> None:
    (services,) = (document["services"] for document in documents(COMPOSE / "compose.yaml"))
    (over,) = (document["services"] for document in documents(COMPOSE / "gpu.yaml"))
    (data,) = parse(shlex.split(services["data"]["command"]))
    (asked,) = parse(services["trainer"]["healthcheck"]["test"][1:])
    for command in (services["trainer"]["command"], over["trainer"]["command"]):
        config = parse(shlex.split(command))[-1]
        assert config.data.root == data.out and config.run_dir == str(asked.run)
    # The bucket is a folder of the server, which has to be there.
    bucket = data.out.removeprefix("s3://").split("/")[0]
    root = services["s3"]["command"][-1]
    assert services["s3"]["volumes"] == [f"bucket:{root}/{bucket}"]
    environment = services["trainer"]["environment"]
    keys = f"{environment['AWS_ACCESS_KEY_ID']},{environment['AWS_SECRET_ACCESS_KEY']}"
    assert keys in services["s3"]["command"]
    assert environment["MLFLOW_TRACKING_URI"].removeprefix("http://") in services["mlflow"]["command"]
    # Volumes take over the owner of the image's folder; without one they are root's, and nobody could write.
    made = (REPOSITORY / "Dockerfile").read_text()
    for name in ("mlflow", "trainer"):
        assert all(volume.split(":")[1] in made for volume in services[name]["volumes"])


# ---- Slurm, SkyPilot, DeepSpeed ---------------------------------------------------------------------------------------


# Runs the command on both nodes, and ends with the larger exit code, as srun does.
SRUN = 'SLURM_PROCID=0 "$@"; a=$?; SLURM_PROCID=1 "$@"; b=$?; exit $((a > b ? a : b))'


def submit(folder: Path, *codes: int, srun: str = SRUN, **more: str) -> tuple[int, list[list[str]]]:
    """Run the batch script with Slurm's commands replaced. codes: what the training ends with on each node."""
    programs = {
        "srun": srun, "python": f"codes=({' '.join(map(str, codes))}); exit ${{codes[$SLURM_PROCID]}}",
        "scontrol": "echo node1; echo node2", "scancel": "kill -TERM $(cat step)",
    }  # fmt: skip
    place = {
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    return run_shell(SBATCH, folder, programs, **place, **more)


@pytest.mark.parametrize(
    ("codes", "code", "again"),
    [((0, 0), 0, False), ((1, 1), 1, False), ((2, 75), 2, False), ((75, 3), 3, False), ((75, 75), 75, True),
     ((75, 143), 143, True)],
)  # fmt: skip
def test_slurm_starts_a_training_again_after_what_passes(
    codes: tuple[int, int], code: int, again: bool, tmp_path: Path
) -> None:
    ended, calls = submit(tmp_path, *codes)
    assert ended == code
    assert (["scontrol", "requeue", "7"] in calls) == again


def test_slurm_stops_starting_again_in_the_end(tmp_path: Path) -> None:
    _, calls = submit(tmp_path, 75, 75, SLURM_RESTART_COUNT="50")
    assert ["scontrol", "requeue", "7"] not in calls


def test_before_the_time_is_up_slurm_has_the_ranks_save_and_starts_again(tmp_path: Path) -> None:
    """The signal comes to the batch script, which hands it to the step and waits for its end."""
    srun = "trap 'sleep 0.3; exit 143' TERM\necho $$ > step\nkill -USR1 $PPID\nfor i in {1..200}; do sleep 0.1; done"
    ended, calls = submit(tmp_path, srun=srun)
    assert ended == 143
    assert [call[0] for call in calls] == ["scontrol", "srun", "scancel", "scontrol"]
    assert calls[2] == ["scancel", "--signal", "TERM", "7.0"]


def test_the_command_of_slurm_parses(tmp_path: Path) -> None:
    _, calls = submit(tmp_path, 0, 0)
    command, same = (call for call in calls if call[0] == "python")
    assert command == same
    launcher, config = parse(command)
    assert (launcher.nnodes, launcher.rdzv_endpoint) == ("2", "node1:29500")
    gpus = re.search(r"--gpus-per-node (\d+)", SBATCH.read_text())
    assert gpus and config.optim.global_batch % (2 * int(gpus[1])) == 0


def test_the_command_of_skypilot_parses_and_recovers_after_what_passes(tmp_path: Path) -> None:
    (task,) = documents(CLUSTERS / "skypilot" / "train.yaml")
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75, 143]}
    place = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    ended, (command,) = run_shell(task["run"], tmp_path, {"python": "exit 75"}, **place)
    assert ended == 75  # the shell hands it on
    launcher, config = parse(command)
    assert (launcher.nnodes, launcher.nproc_per_node, launcher.rdzv_endpoint) == ("2", "8", "10.0.0.1:29500")
    assert config.loop.mirror  # the disks of spot machines do not outlive them


def test_the_hostfile_is_one() -> None:
    assert fetch_hostfile(str(CLUSTERS / "deepspeed" / "hostfile")) == {"node1": 8, "node2": 8}


# ---- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_commands_in_comments_and_prose_parse(page: Path) -> None:
    begins = " {4}" if page.suffix == ".md" else "# {3}"
    for line in page.read_text().splitlines():
        if found := re.match(
            begins + r"((?:deepspeed|torchrun|python (?:launch|tuning)/).*?)(?: {2,}.*| +#.*)?$", line
        ):
            parse(shlex.split(found[1].replace("…", "")))


@pytest.mark.parametrize("system", sorted(path.name for path in CLUSTERS.iterdir()))
def test_the_docs_name_every_system(system: str) -> None:
    assert f"infra/clusters/{system}/" in (REPOSITORY / "docs" / "clusters.md").read_text()


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([2], 2), ([75, 2], 2), ([143, 75], 143), ([75, -9], 137), ([-9], 137), ([75], 75), ([1, 75, 3], 3), ([-15], 143)],
)
def test_ranks_that_end_apart_have_one_exit_code(codes: list[int], expected: int) -> None:
    assert exit_code(codes) == expected
