"""Docs name files, links and options that exist."""

import functools
import re
import subprocess
from pathlib import Path

import pytest

from infra.config import flatten
from launch.runs.config import make_config
from launch.runs.segmenter import SegmenterConfig
from tests.docs_tables import TABLE, refreshed
from trainer.methods import METHODS
from tuning.config import SearchConfig

REPOSITORY = Path(__file__).parents[1]
DOCS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
FOLDERS = ("infra", "pipelines", "trainer", "launch", "tuning", "tests", "docs")
# Options of other programs that docs show.
OTHERS = {
    "--num_gpus", "--nproc_per_node", "--nnodes", "--hostfile", "--rdzv_backend", "--rdzv_endpoint", "--env-manager",
    "--backend-store-uri", "--standalone", "--master_addr", "--master_port", "--gpus", "--head", "--rm", "--network",
    "--ipc", "--shm-size", "--network-host", "--default-artifact-root", "--host", "--port", "--no-lora", "--version",
    "--allowed-hosts", "--build", "--max-restarts", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--requeue",
    "--signal", "--onnx", "--saveEngine", "--fp16", "--minShapes", "--optShapes", "--maxShapes", "--output_model",
    "--data-binary",
}  # fmt: skip


def ids(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("page", DOCS, ids=ids)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    linked = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in linked if target and not (page.parent / target).exists()]
    named = re.findall(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./-]+\.(?:py|sh|yaml|md|png))", text)
    missing += [name for name in named if not (REPOSITORY / name).exists()]
    assert not missing


@functools.cache
def options() -> set[str]:
    """All names that a command of ours takes: of trees of options and short forms, and those of plain parsers."""
    trees = [flatten(make_config({"method.name": name})) for name in METHODS]
    trees += [flatten(SegmenterConfig()), flatten(SearchConfig())]
    names = {f"--{name.replace('_', '-')}" for tree in trees for name in tree}
    sources = subprocess.run(
        ["git", "grep", "-hoE", "[\"'`]--[a-zA-Z][a-zA-Z0-9_.-]*", "--", "*.py", "*.sh"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return names | {name.lstrip("\"'`") for name in sources.split()}


@pytest.mark.parametrize("page", DOCS, ids=ids)
def test_options_that_a_page_names_exist(page: Path) -> None:
    shown = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w.-]*\w", page.read_text()))
    assert not shown - options() - OTHERS


@pytest.mark.parametrize("page", [page for page in DOCS if TABLE.search(page.read_text())], ids=ids)
def test_tables_are_what_their_commands_print(page: Path) -> None:
    assert page.read_text() == refreshed(page.read_text()), "python -m tests.docs_tables writes them anew"
