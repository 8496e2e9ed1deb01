"""The command as people type it: a process of its own, and what it said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

TIMEOUT_S = 120.0


def miss(
    *arguments: object, stdin: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `miss` to its end."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "miss", *map(str, arguments)], capture_output=True, text=True,
        timeout=TIMEOUT_S, check=False, input=stdin, env={**os.environ, **(environment or {})},
    )  # fmt: skip
