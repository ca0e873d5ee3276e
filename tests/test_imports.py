"""Packages import only those below them, and nothing that is not declared."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from .conftest import ROOT

PACKAGE = ROOT / "beauty_bafe"
LOCAL = {"beauty_bafe", "tests", "train", "retrieve", *(file.stem for file in (ROOT / "benchmarks").glob("*.py"))}
SHARED = {"cli", "compiled", "config", "extras", "manifest", "process", "progress", "versions", ""}
MAY_IMPORT = {
    "data": set[str](),
    "models": set[str](),
    "recipe": {"models"},
    "extraction": {"data", "models", "recipe"},
    "index": {"models"},
    "rerank": {"data", "models", "extraction", "index"},
    "retrieval": {"data", "models", "extraction", "index", "rerank"},
    "evaluation": {"data", "models", "extraction", "index", "rerank", "retrieval"},
    "serving": {"data", "models", "extraction", "index", "rerank", "retrieval", "retriever"},
    **{name: set[str]() for name in SHARED - {""}},
}


def imported(file: Path) -> set[str]:
    """What a file imports of ours, wherever in it, by the first name below the package."""
    room = file.relative_to(PACKAGE).parts[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ["beauty_bafe", *room][: len(room) + 2 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "beauty_bafe" else {module}
    return {name.split(".")[1] for name in names if name.startswith("beauty_bafe.")}


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_nothing_imports_upwards(name: str) -> None:
    files = sorted((PACKAGE / name).rglob("*.py")) or [PACKAGE / f"{name}.py"]
    for file in files:
        assert imported(file) <= MAY_IMPORT[name] | SHARED | {name}, file


def test_every_room_is_listed() -> None:
    rooms = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert rooms - {"commands"} <= set(MAY_IMPORT), "say in MAY_IMPORT what a new folder may import"


def test_every_import_is_declared() -> None:
    """What files import by its distribution's name, in pyproject.toml: as a dependency, or in an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("_", "-") for line in lines}
    owners = packages_distributions()
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        tree = list(ast.walk(ast.parse(file.read_text())))
        names = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in tree if isinstance(node, ast.ImportFrom) and not node.level}
        for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - LOCAL:
            found = {owner.lower().replace("_", "-") for owner in owners.get(name, [name])}
            assert found & declared, f"{file} imports {name} of {found}"
