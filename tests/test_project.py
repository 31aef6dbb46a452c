"""Rules of the project that a parser can check."""

import ast
import graphlib
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]
MAY_IMPORT = {
    "infra": {"infra"},
    "pipelines": {"pipelines", "infra"},
    "trainer": {"trainer", "infra"},
    "launch": {"launch", "trainer", "pipelines", "infra"},
    "tuning": {"tuning", "launch", "trainer", "pipelines", "infra"},
}
LONGEST_FILE = 400  # lines
SOURCES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for package in MAY_IMPORT
    for path in sorted((REPOSITORY / package).rglob("*.py"))
}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, at its top or later; `from a import b` imports a.b if that is a module, else a."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports name the package they come from"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in SOURCES else node.module


def test_imports_run_one_way() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name, path in SOURCES.items()
        for imported in imports(path)
        if (package := imported.split(".")[0]) in MAY_IMPORT and package not in MAY_IMPORT[name.split(".")[0]]
    ]
    assert not wrong


def test_no_modules_import_each_other() -> None:
    graph = {
        name: {each for each in imports(path) if each in SOURCES and each != name} for name, path in SOURCES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_no_file_is_long() -> None:
    files = [*SOURCES.values(), *(REPOSITORY / "tests").rglob("*.py")]
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_every_dependency_is_pinned_at_a_version_it_allows() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(name): version
        for name, version in (line.split("==") for line in lines if not line.startswith("#"))
    }
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        pinned = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), f"{text} and {pinned}"


def test_constraints_fit_a_cpu_and_a_cuda_install() -> None:
    """No local version (+cpu), no path, no address."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"#.*|[\w.-]+==[\w.!-]+", line)] == []


@pytest.mark.parametrize("script", ["infra/setup.sh", ".ci/run"])
def test_shell_scripts_parse_and_may_run(script: str) -> None:
    path = REPOSITORY / script
    subprocess.run(["bash", "-n", path], check=True)
    assert path.stat().st_mode & 0o111


def test_make_explains_itself() -> None:
    shown = subprocess.run(["make", "-s"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "demo", "check", "test", "ui", "clean"):
        assert f"make {target}" in shown


def test_what_a_container_of_the_example_leaves_outlives_it() -> None:
    """Runs, drawn data and MLflow's store come into the folder that is worked in."""
    (command,) = re.findall(r"^# +(docker run .*)$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
    mounted, working = (re.search(pattern, command) for pattern in (r'-v "\$PWD:(\S+)"', r"-w (\S+)"))
    assert mounted and working and mounted[1] == working[1]
