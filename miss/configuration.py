"""Which settings each process has, and how a command reads them: the process's TOML file < the environment <
the flags. Imports a process's settings only when they are asked for, so that `miss --help` stays quick."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archive.errors import SettingsError
from archive.settings import load

if TYPE_CHECKING:
    from federation.settings import HubSettings
    from node.settings import NodeSettings
    from portal.settings import PortalSettings


class Process(StrEnum):
    """The processes of MISS that have a settings file."""

    HUB = "hub"
    NODE = "node"
    PORTAL = "portal"

    @property
    def file(self) -> str:
        return f"{self.value}.toml"


SettingsFile = Annotated[
    Path | None,
    typer.Option("--settings", "-s", metavar="FILE", help="The process's settings file (TOML).",
                 dir_okay=False, show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", show_default=False,
                 help="One setting, over the file and the environment; may be given again."),
]
State = Annotated[
    Path,
    typer.Option("--state", "-d", metavar="DIR", file_okay=False,
                 help="The region's folder (made by `miss ca init`) or the node's (`miss node enrol`)."),
]


def settings_class(process: Process) -> type[Any]:
    """The dataclass that a process's settings file fills."""
    if process is Process.HUB:
        from federation.settings import HubSettings
        return HubSettings
    if process is Process.NODE:
        from node.settings import NodeSettings
        return NodeSettings
    from portal.settings import PortalSettings
    return PortalSettings


def hub(path: Path | None, overrides: Sequence[str] | None = None) -> HubSettings:
    from federation.settings import HubSettings
    return load(HubSettings, path, os.environ, flags(overrides))


def node(path: Path | None, overrides: Sequence[str] | None = None) -> NodeSettings:
    from node.settings import NodeSettings
    return load(NodeSettings, path, os.environ, flags(overrides))


def portal(path: Path | None, overrides: Sequence[str] | None = None) -> PortalSettings:
    from portal.settings import PortalSettings
    return load(PortalSettings, path, os.environ, flags(overrides))


def flags(overrides: Sequence[str] | None) -> dict[str, object]:
    """`KEY=VALUE` texts as the loader wants them."""
    given: dict[str, object] = {}
    for text in overrides or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise SettingsError(f"--set {text}: write KEY=VALUE, for example --set dimse.port=11112")
        given[key.strip()] = value
    return given


def found(path: Path | None, process: Process) -> Path:
    """The settings file that was named, else the process's own in the working directory."""
    if path is not None:
        return path
    here = Path(process.file)
    if not here.exists():
        raise SettingsError(f"no settings file: give --settings FILE, or run where {process.file} is")
    return here
