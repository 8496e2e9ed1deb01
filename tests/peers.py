"""Where the programs are that the tests speak to. pynetdicom installs scripts of the same names as DCMTK's
beside our interpreter: those are not what is meant."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

_OURS = Path(sys.prefix, "bin")
_ELSEWHERE = os.pathsep.join(
    folder for folder in os.get_exec_path() if not Path(folder).is_dir() or not Path(folder).samefile(_OURS))


def dcmtk(program: str) -> str:
    """The path of a DCMTK program; the test that asks is skipped where there is none."""
    found = shutil.which(program, path=_ELSEWHERE)
    if found is None:
        pytest.skip(f"DCMTK's {program} is not installed")
    return found
