"""Where the programs are that the tests speak to. pynetdicom installs scripts of the same names as DCMTK's,
in whichever environment it is: those are not what is meant."""

from __future__ import annotations

import os
import shutil

import pytest


def dcmtk(program: str) -> str:
    """The path of a DCMTK program; the test that asks is skipped where there is none."""
    for folder in os.get_exec_path():
        found = shutil.which(program, path=folder)
        if found is not None and not _is_script(found):
            return found
    pytest.skip(f"DCMTK's {program} is not installed")


def _is_script(path: str) -> bool:
    with open(path, "rb") as program:
        return program.read(2) == b"#!"
