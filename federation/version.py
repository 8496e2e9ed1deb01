"""The version of the software that runs, as each side tells it to the other."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "miss-archive"
PROTOCOL = 1  # of the conversation between node and hub: the newest that this release speaks
PROTOCOL_OLDEST = 1  # and the oldest


def software_version() -> str:
    """The installed version; "unknown" when it runs from a tree that was never installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"
