"""The layers of ARCHITECTURE.md as a test: who may import whom, read from the source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# package -> the packages of ours that it may import; an arrow upwards is a mistake.
ALLOWED: dict[str, set[str]] = {
    "archive": set(),
    "monitoring": {"archive"},
    "protos": set(),
    "certs": {"archive", "protos"},
    "federation": {"archive", "protos", "certs", "monitoring"},
    "node": {"archive", "protos", "certs", "monitoring", "federation"},
    "portal": {"archive", "protos", "certs", "monitoring", "federation"},
    "miss": {"archive", "protos", "certs", "monitoring", "federation", "node", "portal"},
    # nobody's dependency
    "bench": {"archive", "protos", "certs", "monitoring", "federation", "node", "portal", "miss"},
}

# What a package must stay free of, whoever wrote it: archive knows no network, federation speaks no DIMSE and
# no HTTP, certs knows no DICOM.
FOREIGN: dict[str, set[str]] = {
    "archive": {"grpc", "pynetdicom", "httpx", "starlette", "uvicorn", "socket"},
    "federation": {"pynetdicom", "httpx", "starlette", "uvicorn", "http"},
    "certs": {"pydicom", "pynetdicom"},
    "node": {"starlette", "uvicorn"},
    "portal": {"pynetdicom"},
}


def imports(path: Path) -> Iterator[str]:
    """The top-level name of every import in a file, also of those inside functions."""
    for part in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(part, ast.Import):
            yield from (alias.name.split(".")[0] for alias in part.names)
        elif isinstance(part, ast.ImportFrom):
            assert part.level == 0, f"{path}: a relative import hides the layer"
            assert part.module is not None
            yield part.module.split(".")[0]


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_the_layers_below_it(package: str) -> None:
    assert sources(package)
    allowed = ALLOWED[package] | {package}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package) for name in imports(path)
        if name in ALLOWED.keys() | {"tests"} and name not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("package", FOREIGN)
def test_a_package_stays_free_of_what_it_must_not_know(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package) for name in imports(path) if name in FOREIGN[package]
    ]
    assert wrong == []


def test_every_top_level_package_has_a_layer() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == ALLOWED.keys()
