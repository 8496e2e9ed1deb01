"""The generated protobuf code that is checked in is what the .proto files give."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest

from protos import generate

# Another compiler writes another header: only the pinned one can be compared with (extra `dev`).
COMPILER = "1.85.1"


def test_generated_code_is_current() -> None:
    try:
        installed = version("grpcio-tools")
    except PackageNotFoundError:
        pytest.skip("grpcio-tools is not installed")
    if installed != COMPILER:
        pytest.skip(f"grpcio-tools is {installed}, the checked-in code is of {COMPILER}")
    assert generate.stale() == []


def test_the_compiler_is_the_one_that_is_pinned() -> None:
    assert f'"grpcio-tools=={COMPILER}"' in (generate.ROOT / "pyproject.toml").read_text()
