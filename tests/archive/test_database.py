"""What an SQLite database costs a process: descriptors go with the threads that used them."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from pathlib import Path

import pytest

from archive.database import sqlite_url
from archive.index.index import Index


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are listed on Linux alone")
def test_a_thread_takes_its_connection_with_it(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    index = Index.open(sqlite_url(path))
    gc.disable()  # a process with large thresholds collects so rarely that nothing may depend on it
    try:
        for _ in range(60):
            thread = threading.Thread(target=index.lookup, args=("1.2.3",))
            thread.start()
            thread.join()
        assert _open_files(path) < 20
    finally:
        gc.enable()
        index.close()


def _open_files(path: Path) -> int:
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{number}").startswith(str(path))
    return found
