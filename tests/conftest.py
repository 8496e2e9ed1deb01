"""Databases for the tests: an SQLite file, and a real PostgreSQL server for as long as the session."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from archive.database import sqlite_url

START_S_MAX = 60.0
_numbers = itertools.count(1)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Octets do not name a case: some are made anew by each process that collects."""
    return "octets" if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The folder of the server's socket. Skips where PostgreSQL's programs are not installed."""
    programs, owner = _programs(), _owner()
    home = Path(tempfile.mkdtemp(prefix="miss-pg-"))
    try:
        if owner is not None:
            os.chown(home, owner, -1)
        _make(programs, home, owner)
        with (home / "log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", home / "data", "-k", home, "-c", "listen_addresses="],
                stdout=log, stderr=log, cwd=home, user=owner,
            )  # fmt: skip
        try:
            _wait_until_ready(server, home)
            yield str(home)
        finally:
            server.send_signal(signal.SIGINT)  # fast shutdown: sessions that a test left open are ended
            server.wait(timeout=START_S_MAX)
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def postgresql_url(postgresql_server: str) -> Iterator[str]:
    """An empty database of the server."""
    name = f"t{next(_numbers)}"
    with _connect(postgresql_server) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield f"postgresql://miss@/{name}?host={postgresql_server}"
    with _connect(postgresql_server) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "database.db")
    url: str = request.getfixturevalue("postgresql_url")
    return url


def _programs() -> Path:
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if versions and (versions[-1] / "postgres").exists():
        return versions[-1]
    found = shutil.which("postgres")
    if found is None or not (Path(found).parent / "initdb").exists():
        pytest.skip("PostgreSQL's server programs are not installed")
    return Path(found).parent


def _owner() -> int | None:
    """The account that runs the server, when it can't be our own: PostgreSQL refuses root."""
    if os.getuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_uid
    except KeyError:
        pytest.skip("PostgreSQL does not run as root and there is no account postgres")


def _make(programs: Path, home: Path, owner: int | None) -> None:
    made = subprocess.run(
        [programs / "initdb", "-D", home / "data", "-U", "miss", "-A", "trust", "-E", "UTF8", "--locale=C"],
        capture_output=True, text=True, check=False, cwd=home, user=owner,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr


def _connect(folder: str) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(f"postgresql://miss@/postgres?host={folder}", autocommit=True)


def _wait_until_ready(server: subprocess.Popen[bytes], home: Path) -> None:
    deadline = time.monotonic() + START_S_MAX
    while True:
        try:
            _connect(str(home)).close()
            return
        except psycopg.OperationalError:
            assert server.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.05)
