"""What bad input gets from launch/train.py: one sentence that names the thing, exit code 2, and nothing written."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from botocore.config import Config

from infra.config import flatten
from infra.errors import UserError
from infra.storage import LocalStorage, S3Storage
from launch import train as script
from launch.runs.config import JobConfig, make_config, parse_arguments
from launch.runs.data import data_identity
from launch.runs.folder import RunFolder, resolved
from launch.runs.training import check_sizes
from launch.runs.translator import train
from pipelines.manifest import MANIFEST, Manifest, load_manifest
from tests.conftest import S3Server
from tests.pipelines.shardmaker import write_root
from trainer.checkpointer import Checkpointer
from trainer.networks.sizes import Sizes

pytestmark = pytest.mark.slow

SMALL = [
    "--crop", "16", "--ngf", "4", "--ndf", "4", "--method.generator.blocks", "6", "--method.discriminator.layers", "1",
    "--method.head-dim", "8", "--method.patches", "8", "--engine.device", "cpu", "--precision", "fp32", "--max-steps", "2",
    "--data.decoder", "pillow", "--data.threads", "1", "--loop.samples", "1",
]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """11 source and 7 target images of 48x32."""
    write_root(LocalStorage(tmp_path / "data"))
    return tmp_path / "data"


def files() -> dict[Path, int]:
    """When each was written; without the lock of a run, which a start holds while it looks at the folder."""
    return {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file() and path.name != "run.lock"}


def refused(words: str, *line: str) -> None:
    """The command line ends with a sentence, and what was there before is all that is there."""
    before = files()
    with pytest.raises(UserError, match=words) as caught:
        train(parse_arguments([*SMALL, *line]))
    assert "\n" not in str(caught.value)
    assert files() == before


# ---- options that do not fit each other or the data -------------------------------------------------------------------


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--crop", "33"], "crop of 33 pixels is larger than the source images of 48x32: pass --crop 32"),
        (
            ["--crop", "30"],
            r"images of 30x30 pixels .*\(either side must be multiples of 4 from 8 up\): pass --crop 28, or",
        ),
        (
            ["--crop", "16", "--method.discriminator.layers", "3"],
            "either side must be multiples of 4 from 24 up.: pass --crop 24 or more",
        ),
        (
            ["--crop", "32", "--method.discriminator.layers", "4"],
            "from 48 up.: prepare images of 48x48 or more, or give options of smaller",
        ),
        (["--crop", "8", "--method.constraint.smoothness", "1"], "multiples of 4 from 12 up.: pass --crop 12 or more"),
        (["--method.taps", "0,99"], "tap 99 does not exist in this generator"),
        (["--method.taps", "4,4"], "taps 4, 4 name one twice"),
        (["--method.robust.taps", "4,4"], "taps 4, 4 name one twice"),
        (["--global-batch", "3", "--optim.accumulation", "2"], "global batch of 3 does not divide.*multiple of 2"),
        (["--precision", "fp16", "--engine.zero-stage", "1"], "ZeRO with fp16 is not supported"),
        (
            ["--engine.graphs", "true", "--precision", "fp16"],
            "engine.graphs cannot capture fp16, .*: give --precision bf16",
        ),
        (["--engine.graphs", "true", "--engine", "ddp"], "captures the steps of one process, and this is engine ddp"),
        (["--engine.triton", "true"], "--engine.triton true needs a GPU, and this run is on a cpu: leave it out"),
        (
            ["--engine.zero-stage", "1"],
            "zero-stage 1 needs DeepSpeed, and this is engine single: start with the deepspeed",
        ),
        (["--engine.zero-stage", "1", "--engine", "ddp"], "zero-stage 1 needs DeepSpeed, and this is engine ddp"),
        (
            ["--evaluation.segmenter", "runs/judge"],
            "evaluation.segmenter is for evaluations .*: give --evaluation.every",
        ),
        (["--evaluation.inception", "weights.pt"], "evaluation.inception is for evaluations .*, or leave it out"),
        (["--evaluation.images", "9"], "evaluation.images is for evaluations during training, and there are none"),
        (["--evaluation.best", "Dist"], "evaluation.best is for evaluations during training, and there are none"),
        (["--method.all-negatives", "true", "--optim.accumulation", "2"], "all_negatives needs the whole global batch"),
        (["--loop.mirror", "gs://bucket"], "gs://bucket is neither a folder nor an s3:// URL"),
    ],
)
def test_options_that_cannot_work(root: Path, line: list[str], words: str) -> None:
    refused(words, "--data", str(root), *line)


@pytest.mark.usefixtures("place")
def test_whole_images_of_a_size_that_the_networks_do_not_take(tmp_path: Path) -> None:
    """They are not cut to the multiple below: --crop none promises whole images."""
    write_root(LocalStorage(tmp_path / "fruit"), (1,), (1,), (286, 286))
    line = ["--data", str(tmp_path / "fruit"), "--task", "apple2orange", "--crop"]
    refused("images of 286x286 pixels do not suit the networks .*: pass --crop 284, or prepare", *line, "none")
    write_root(LocalStorage(tmp_path / "tiny"), (1,), (1,), (48, 6))
    refused("48x6 pixels .*: prepare images of 8x8 or more", "--data", str(tmp_path / "tiny"), "--crop", "none")


@pytest.mark.parametrize(
    ("prepared", "remedy"), [(24, "pass --crop 24 or more"), (23, "prepare images of 24x24 or more")]
)
def test_the_remedy_for_a_small_crop_is_one_that_the_images_allow(prepared: int, remedy: str) -> None:
    with pytest.raises(UserError, match=f"16x16 pixels .*must be multiples of 4 from 24 up.: {remedy}"):
        check_sizes(Sizes(4, 24), (16, 16), prepared)


@pytest.mark.usefixtures("place")
def test_one_engine_for_two_processes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    refused("engine single cannot use 2 processes", "--data", str(root), "--engine", "single")


# ---- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
def test_absent_data(tmp_path: Path) -> None:
    refused(f"no prepared data at {tmp_path}/none .*launch/prepare.py", "--data", str(tmp_path / "none"))
    refused("the data location is empty", "--data", "")
    refused("there is no data for cat2dog: name it with --data, .* prepare it with: python launch", "--task", "cat2dog")


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"format": 1}', b"\xff"])
def test_a_damaged_manifest(root: Path, content: bytes) -> None:
    (root / MANIFEST).write_bytes(content)
    refused("manifest", "--data", str(root))


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("domain", ["source", "target"])
def test_a_domain_without_samples(root: Path, domain: str) -> None:
    manifest = load_manifest(LocalStorage(root))
    split = dataclasses.replace(manifest.splits[f"train/{domain}"], shards=())
    changed = Manifest({**manifest.splits, f"train/{domain}": split})
    (root / MANIFEST).write_text(changed.to_json())
    refused(f"the data has no train images of the {domain} domain", "--data", str(root))


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if how == "truncated" else content[:600] + b"x" + content[601:])


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("how", ["truncated", "changed"])
def test_a_damaged_shard_that_the_sample_grid_meets(root: Path, how: str) -> None:
    damage(root / "train/source/000000.tar", how)
    refused(r"train/source/000000.tar is damaged \(not the SHA-256 of the manifest\)", "--data", str(root))


def spoil_images(root: Path) -> None:
    """Every image of the last source shard becomes something else of its length, under hashes that fit."""
    storage = LocalStorage(root)
    manifest = load_manifest(storage)
    split = manifest.splits["train/source"]
    last = split.shards[-1]
    content = storage.read(last.name).replace(b"\xff\xd8\xff", b"GIF")
    storage.write(last.name, content)
    shard = dataclasses.replace(last, sha256=hashlib.sha256(content).hexdigest())
    changed = dataclasses.replace(split, shards=(*split.shards[:-1], shard))
    storage.write(MANIFEST, Manifest({**manifest.splits, "train/source": changed}).to_json().encode())


@pytest.mark.parametrize("fault", ["hash", "image"])
def test_damage_that_only_training_meets_ends_it_with_a_sentence(root: Path, place: Path, fault: str) -> None:
    if fault == "hash":
        damage(root / "train/source/000002.tar", "changed")
    else:
        spoil_images(root)
    words = {
        "hash": "train/source/000002.tar is damaged",
        "image": "image source_.* in train/source/000002.tar cannot be decoded",
    }
    with pytest.raises(UserError, match=words[fault]):
        train(parse_arguments([*SMALL, "--data", str(root), "--run-dir", "run", "--max-steps", "12"]))
    assert (place / "run" / "config.yaml").exists() and not (place / "run" / "model").exists()


# ---- object storage -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("place", "s3_server")
def test_a_missing_bucket() -> None:
    refused("the S3 bucket no-such-bucket does not exist: create it", "--data", "s3://no-such-bucket/data")


@pytest.mark.usefixtures("place")
def test_an_empty_bucket(s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket()
    refused(f"no prepared data at s3://{bucket}/x", "--data", f"s3://{bucket}/x")


@pytest.mark.usefixtures("place")
def test_denied_access(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3_server.make_bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SOMETHINGELSE")
    refused(f"access to s3://{bucket} is denied.*AWS_ACCESS_KEY_ID", "--data", f"s3://{bucket}")


@pytest.mark.usefixtures("place", "s3_server")
@pytest.mark.parametrize("option", ["--data", "--loop.mirror"])
def test_an_endpoint_out_of_reach(root: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    once = S3Storage._CONFIG.merge(Config(retries={"mode": "standard", "total_max_attempts": 1}))
    monkeypatch.setattr(S3Storage, "_CONFIG", once)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    refused("S3 endpoint http://127.0.0.1:1 .*cannot be reached", "--data", str(root), option, "s3://bucket/x")


# ---- the run folder -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(root: Path, place: Path) -> JobConfig:
    """That of a run in the folder `run`, which has a checkpoint."""
    asked = parse_arguments([*SMALL, "--data", str(root), "--run-dir", "run"])
    config = resolved(asked, root=str(root), run_dir="run", precision="fp32")
    RunFolder(Path("run")).open(config)
    keep(config, Path("run/checkpoints"))
    return config


def keep(job: JobConfig, folder: Path, **changed: object) -> Path:
    """A checkpoint as a run of this configuration would write it after a step."""
    method = job.method.build(seed=0, global_batch=1)
    tensors = {name: method.get_submodule(name).state_dict() for name in ("generator", "discriminator", "heads")}
    about = {"step": 1, "scalers": {}, "data": data_identity(str(job.data.root)), "config": flatten(job)}
    return Checkpointer(folder, keep=1).save(1, tensors, {**about, **changed})


@pytest.mark.usefixtures("place")
def test_a_folder_that_is_no_run(root: Path) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter.tex").write_text("text")
    Path("file").write_text("text")
    for name in ("thesis", "file"):
        refused(f"{name} exists and is not a run folder: name another", "--data", str(root), "--run-dir", name)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("file/run", "file is a file"),
        ("x" * 300, "File name too long"),
        ("/proc/run", "No such file or directory|no right to write in /proc"),
        ("a\0b", "embedded null byte"),
    ],
)
def test_a_run_folder_that_cannot_be_made(root: Path, name: str, why: str) -> None:
    Path("file").write_text("text")
    refused(
        f"the run folder .* cannot be written .*({why}).*: name another --run-dir",
        "--data",
        str(root),
        "--run-dir",
        name,
    )


@pytest.mark.parametrize(
    ("mirror", "why"),
    [("file/x", "file is a file"), ("/proc/x", "No such file or directory|no right to write in /proc")],
)
@pytest.mark.usefixtures("place")
def test_a_mirror_that_cannot_be_made(root: Path, mirror: str, why: str) -> None:
    Path("file").write_text("text")
    words = f"--loop.mirror {mirror} cannot be written .*({why}).*: name"
    refused(words, "--data", str(root), "--loop.mirror", mirror)


def test_a_run_folder_without_rights_is_refused_before_scenes_are_drawn(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != place)  # root may write everywhere
    refused(f"the run folder run cannot be written .no right to write in {place}.: name another", "--run-dir", "run")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--run-dir", "--run-dir s3://bucket/x is a place in a store: name a folder here, and give --loop.mirror"),
        ("--data.cache-dir", "--data.cache-dir s3://bucket/x is a place in a store"),
    ],
)
def test_folders_of_this_machine_are_not_in_a_store(config: JobConfig, option: str, words: str) -> None:
    refused(words, "--data", str(config.data.root), option, "s3://bucket/x")
    assert not Path("s3:").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            ["--ngf", "8"],
            "run has method.generator.ngf = 4, not 8: repeat its options to continue it, or name another --run-dir",
        ),
        (["--seed", "1"], "run has seed = 0, not 1"),
        (["--method", "fastcut"], "run has optim.epochs = |run has method"),
        (["--method.taps", "0,4"], r"run has method.taps = \[0, 4, 8, 12, 16\], not \(0, 4\)"),
        (["--precision", "bf16"], "run has engine.precision = fp32, not bf16"),
    ],
)
def test_the_run_of_another_configuration(config: JobConfig, line: list[str], words: str) -> None:
    refused(words, "--data", str(config.data.root), "--run-dir", "run", *line)


def test_a_run_on_other_data(config: JobConfig, tmp_path: Path) -> None:
    write_root(LocalStorage(tmp_path / "other"), source=(5,))
    refused("step_1 was trained on other data", "--data", str(tmp_path / "other"), "--run-dir", "run")


def test_a_damaged_checkpoint(config: JobConfig, caplog: pytest.LogCaptureFixture) -> None:
    """It is set aside, and the run goes on from the one before, or begins."""
    path = Path("run/checkpoints/step_1/generator.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level("WARNING"):
        train(parse_arguments([*SMALL, "--data", str(config.data.root), "--run-dir", "run"]))
    assert "step_1" in caplog.text and Path("run/checkpoints/step_1.damaged").is_dir()


def test_a_checkpoint_of_another_architecture(config: JobConfig) -> None:
    other = make_config(flatten(config), {"method.generator.ngf": 8})
    line = ["--data", str(config.data.root), "--run-dir", "run"]
    keep(other, Path("run/checkpoints"))
    refused("step_1 has method.generator.ngf = 8, not 4", *line)
    keep(other, Path("run/checkpoints"), config=flatten(config))
    refused("step_1 holds another architecture: generator model.* is .8,.* there and .4,.* here", *line)


def test_a_mirror_of_another_run(config: JobConfig, root: Path, tmp_path: Path) -> None:
    keep(make_config(flatten(config), {"seed": 5}), tmp_path / "mirror")
    with pytest.raises(UserError, match="step_1 has seed = 5, not 0"):
        train(
            parse_arguments(
                [*SMALL, "--data", str(root), "--run-dir", "new", "--loop.mirror", str(tmp_path / "mirror")]
            )
        )
    assert (tmp_path / "mirror" / "step_1" / "manifest.json").exists()
    assert RunFolder(Path("new")).saved() == {}  # what was fetched does not block the folder


# ---- as a person sees it --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("line", [["--task", "gta2mars"], ["--precison", "fp32"]])
def test_main_prints_the_sentence_and_exits_with_2(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *line])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: unknown ") and shown.err.count("\n") == 1


def test_the_script_itself_prints_one_line_without_a_traceback(place: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, script.__file__, "--data", "nowhere", "--engine.device", "cpu"],
        cwd=place, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no prepared data at nowhere")
    assert list(place.iterdir()) == []
