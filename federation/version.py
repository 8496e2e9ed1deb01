"""The version of the software that runs, as each side tells it to the other."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "miss-archive"


def software_version() -> str:
    """The installed version; "unknown" when it runs from a tree that was never installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"
