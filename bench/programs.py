"""The programs of others that the bench runs, where they are and which versions. Installs nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from importlib import metadata

VERSION_S_MAX = 30.0
NAGLE_OFF = "TCP_NODELAY"  # what DCMTK looks at, and Orthanc with it: unset, Nagle's algorithm is on


@cache
def find(program: str) -> str | None:
    """The path of a program that is no script: pynetdicom installs scripts of the same names as DCMTK's."""
    for folder in [*os.get_exec_path(), "/usr/sbin"]:
        path = shutil.which(program, path=folder)
        if path is not None and not _is_script(path):
            return path
    return None


def _is_script(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"#!"


@cache
def version(program: str) -> str:
    """The first line of what the program says of itself; empty when it is not there."""
    path = find(program)
    if path is None:
        return ""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=VERSION_S_MAX,
                          check=False)
    line = (said.stdout or said.stderr).strip().partition("\n")[0]
    return line.strip("$ ").removeprefix("dcmtk: ")


def versions() -> dict[str, str]:
    """Every peer and its version, for the table's foot; empty for one that is not there."""
    return {"Orthanc": version("Orthanc"), "DCMTK storescp": version("storescp"),
            "DCMTK storescu": version("storescu"), "pynetdicom": metadata.version("pynetdicom")}


def environment(*, nagle: bool = False) -> dict[str, str]:
    """Ours, with Nagle's algorithm off in DCMTK's programs unless they are to run as they come."""
    made = {name: value for name, value in os.environ.items() if name != NAGLE_OFF}
    return made if nagle else {**made, NAGLE_OFF: "1"}
