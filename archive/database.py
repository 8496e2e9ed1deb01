"""One way to a database for the index and the ledger: SQLite in a file, or PostgreSQL by URL, the same
code.

It owns connections (a bounded pool, and one raw connection a thread for SQLite's hot reads), transactions
with their retries, schema versions, and the translation of database errors into ours, without a bound value
in any message. It knows no table. Writes are SERIALIZABLE and repeat on a serialization failure or a busy
database, so `work` must be repeatable; reads are snapshots. No sequence is used, so that distributed SQL
can take over.
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from sqlalchemy import Connection, Engine, Text, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool
from sqlalchemy.types import TypeEngine

from archive.errors import MissError, OutOfResources, SchemaTooNew, SettingsError, Unavailable

T = TypeVar("T")
Step = Callable[[Connection], None]

_SQLITE = "sqlite:///"
POOL_CONNECTIONS_MAX = 8
POOL_WAIT_S_MAX = 30.0
BUSY_WAIT_S_MAX = 30.0
CONNECT_WAIT_S_MAX = 10
SQLITE_LOCK_WAIT_S = 5.0
SQLITE_CACHE_KIB = 16_384

# Serialization failure, deadlock, and what two that make the same table at once may see: all repeat.
_RETRY_STATES = frozenset({"40001", "40P01", "42P07", "42710", "23505"})
_FULL_STATES = frozenset({"53100", "53200", "53300"})
# Data that the database can't hold: out of range, against a constraint, past a limit of the server.
_REFUSED_CLASSES = frozenset({"22", "23", "54"})
_REFUSED = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError)
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_RESTORE = "restore it from a backup"
_CURES = {"index": "stop the process and run `miss rebuild`, which makes it anew"}


class Unacceptable(Unavailable):
    """The database answers, and refuses what it was to write: trying again does not help."""


def Characters() -> TypeEngine[str]:
    """Text compared byte by byte on both databases, so that ranges, prefixes and order agree."""
    return Text().with_variant(Text(collation="C"), "postgresql")


def sqlite_url(path: Path) -> str:
    """The URL of an SQLite file; what a URL would read otherwise is escaped."""
    return f"{_SQLITE}{quote(str(path))}"


def storable(value: str) -> str:
    """`value` as both databases can hold it: no NUL (PostgreSQL refuses it), no lone surrogates."""
    if value.isascii():
        return value.replace("\x00", "") if "\x00" in value else value
    return value.replace("\x00", "").encode("utf-8", "replace").decode("utf-8")


class Database:
    """An open database whose schema is ours. Safe to use from any thread; several processes may have it
    open."""

    def __init__(
        self,
        url: str,
        *,
        name: str,
        steps: Sequence[Step],
        read_only: bool = False,
        durable: bool = True,
    ) -> None:
        """Open, and bring the schema forward by those of `steps` it has not had; `durable=False` lets SQLite
        lose the last commits (never its consistency) in a power cut."""
        self.name = name
        self.read_only = read_only
        self._durable = durable
        self._url = _normalise(url)
        self._local = threading.local()
        self._raw: weakref.WeakSet[_RawConnection] = weakref.WeakSet()
        self._closed = False
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        self._engine = self._sqlite_engine() if self.is_sqlite else self._postgresql_engine()
        if self.is_sqlite:
            self._writer = self._engine.execution_options(miss_begin="BEGIN IMMEDIATE")
            self._reader = self._engine.execution_options(miss_begin="BEGIN")
        else:
            self._writer = self._engine.execution_options(isolation_level="SERIALIZABLE")
            self._reader = self._engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
        try:
            self._bring_forward(steps)
        except BaseException:
            self.close()
            raise

    def write(self, work: Callable[[Connection], T]) -> T:
        """The result of `work` in one transaction that is committed when this returns."""
        if self.read_only:
            raise Unavailable(f"the {self.name} is open for reading alone")
        deadline = time.monotonic() + BUSY_WAIT_S_MAX
        delay_s = 0.002
        while True:
            try:
                with self._writer.begin() as connection:
                    return work(connection)
            except (DBAPIError, PoolTimeout) as error:
                if not _is_passing(error) or time.monotonic() + delay_s > deadline:
                    raise self._translated(error) from None
            time.sleep(delay_s * (0.5 + random.random()))
            delay_s = min(delay_s * 2, 0.25)

    def read(self, work: Callable[[Connection], T]) -> T:
        """The result of `work` on one snapshot, which it can't change."""
        try:
            with self._reader.begin() as connection:
                return work(connection)
        except (DBAPIError, PoolTimeout) as error:
            raise self._translated(error) from None

    def quick(self, statement: str, parameters: Sequence[Any] = ()) -> Any:
        """The first row of a one-row question, or None, past SQLAlchemy: microseconds on SQLite. `?` marks a
        parameter on both databases."""
        if not self.is_sqlite:
            return self.read(
                lambda connection: connection.exec_driver_sql(
                    statement.replace("?", "%s"), tuple(parameters)
                ).fetchone()
            )
        try:
            return self._thread_connection().execute(statement, parameters).fetchone()
        except sqlite3.Error as error:
            raise self._translated(error) from None

    def close(self) -> None:
        """Close every connection that is not in use; the database is not used after that."""
        self._closed = True
        for connection in list(self._raw):
            connection.close()
        self._engine.dispose()

    def _thread_connection(self) -> sqlite3.Connection:
        held: _Held | None = getattr(self._local, "held", None)
        if held is None:
            if self._closed:
                raise Unavailable(f"the {self.name} is closed")
            held = self._local.held = _Held(self._connect_sqlite(mode="ro", factory=_RawConnection))
        return held.connection

    def _sqlite_engine(self) -> Engine:
        path = Path(self._path)
        if self.read_only and not path.exists():
            raise Unavailable(f"the {self.name} is not there yet")
        if not self.read_only:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Patient data or password hashes: for this account alone. The journal takes the file's mode.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        mode = "ro" if self.read_only else "rw"
        engine = create_engine(
            self._url,
            creator=lambda: self._connect_sqlite(mode=mode, factory=sqlite3.Connection),
            poolclass=QueuePool,
            pool_size=POOL_CONNECTIONS_MAX,
            max_overflow=0,
            pool_timeout=POOL_WAIT_S_MAX,
            hide_parameters=True,
        )

        # sqlite3 would begin by itself, late and deferred: two writers would then fail instead of waiting.
        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.exec_driver_sql(connection.get_execution_options().get("miss_begin", "BEGIN"))

        return engine

    @property
    def _path(self) -> str:
        if not self._url.database or self._url.database == ":memory:":
            raise SettingsError(f"the {self.name} needs a file: sqlite:///path")
        return self._url.database

    def _connect_sqlite(self, *, mode: str, factory: type[sqlite3.Connection]) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"file:{quote(os.path.abspath(self._path))}?mode={mode}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=SQLITE_LOCK_WAIT_S,
            cached_statements=256,
            factory=factory,
        )
        if isinstance(connection, _RawConnection):
            self._raw.add(connection)
        for pragma in (
            f"synchronous={'FULL' if self._durable else 'NORMAL'}",
            f"cache_size=-{SQLITE_CACHE_KIB}",
            "case_sensitive_like=ON",  # LIKE as in PostgreSQL; a person's name is compared by its folded form
            "temp_store=MEMORY",
        ):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def _postgresql_engine(self) -> Engine:
        return create_engine(
            self._url,
            pool_size=POOL_CONNECTIONS_MAX,
            max_overflow=0,
            pool_timeout=POOL_WAIT_S_MAX,
            pool_pre_ping=True,
            connect_args={"connect_timeout": CONNECT_WAIT_S_MAX},
            hide_parameters=True,
        )

    def _bring_forward(self, steps: Sequence[Step]) -> None:
        version = self._schema_version()
        if version > len(steps):
            raise SchemaTooNew(
                f"the {self.name} has schema {version}, this release knows {len(steps)}: run the newer one"
            )
        if version == len(steps):
            return
        if self.read_only:
            raise Unavailable(
                f"the {self.name} has schema {version}, {len(steps)} is needed: its writer first"
            )
        if self.is_sqlite:
            self._use_wal()

        def forward(connection: Connection) -> None:
            connection.execute(
                text(
                    "CREATE TABLE IF NOT EXISTS schema_version"
                    " (name TEXT PRIMARY KEY, version INTEGER NOT NULL)"
                )
            )
            row = connection.execute(
                text("SELECT version FROM schema_version WHERE name = :name"), {"name": self.name}
            ).fetchone()
            had = 0 if row is None else int(row[0])
            for step in steps[had:]:
                step(connection)
            statement = (
                "INSERT INTO schema_version (name, version) VALUES (:name, :version)"
                if row is None
                else "UPDATE schema_version SET version = :version WHERE name = :name AND version < :version"
            )
            connection.execute(text(statement), {"name": self.name, "version": len(steps)})

        self.write(forward)

    def _schema_version(self) -> int:
        def version(connection: Connection) -> int:
            exists = (
                "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'schema_version'"
                if self.is_sqlite
                else "SELECT count(*) FROM pg_class WHERE oid = to_regclass('schema_version')"
            )
            if not connection.execute(text(exists)).scalar():
                return 0
            found = connection.execute(
                text("SELECT version FROM schema_version WHERE name = :name"), {"name": self.name}
            ).scalar()
            return 0 if found is None else int(found)

        return self.read(version)

    def _use_wal(self) -> None:
        """WAL is a property of the file; the switch does not wait for other processes, so this does."""
        deadline = time.monotonic() + BUSY_WAIT_S_MAX
        while True:
            connection = self._connect_sqlite(mode="rw", factory=sqlite3.Connection)
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if time.monotonic() > deadline:
                    raise self._translated(error) from None
                time.sleep(0.05)
            finally:
                connection.close()

    def _translated(self, error: Exception) -> MissError:
        """What callers may see of a database error: its kind, never a value."""
        cause = error.orig if isinstance(error, DBAPIError) else error
        state = getattr(cause, "sqlstate", None)
        message = str(cause) if isinstance(cause, sqlite3.Error) else type(cause).__name__
        if state in _FULL_STATES or (isinstance(cause, sqlite3.Error) and "full" in message):
            return OutOfResources(f"the {self.name} has no room: {state or message}")
        if getattr(cause, "sqlite_errorcode", None) in _DAMAGED:
            return Unavailable(f"the {self.name} is damaged ({message}): {_CURES.get(self.name, _RESTORE)}")
        if isinstance(cause, _REFUSED) or (state or "")[:2] in _REFUSED_CLASSES or "binding" in message:
            # SQLite's own words would name a column at most, PostgreSQL's are its error's class.
            return Unacceptable(f"the {self.name} refuses what it was to write: {message} {state or ''}")
        return Unavailable(f"the {self.name} does not answer: {message}{f' {state}' if state else ''}")


class _RawConnection(sqlite3.Connection):
    """A connection of one thread; a subclass, because only that can be referred to weakly."""


class _Held:
    """Closes a thread's connection when the thread ends. A connection refers to itself (by its cache of
    statements), so that without this its descriptor and its memory would stay until a full collection, which
    a process with large thresholds may not see for days."""

    __slots__ = ("connection",)

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def __del__(self) -> None:
        self.connection.close()


def _normalise(url: str) -> URL:
    if url.startswith(_SQLITE):
        return URL.create("sqlite", database=unquote(url[len(_SQLITE) :]))  # SQLAlchemy would not unescape it
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise SettingsError("a database URL is sqlite:///path or postgresql://...") from None
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    raise SettingsError(f"a database URL is sqlite:///path or postgresql://..., not {backend}")


def _is_passing(error: Exception) -> bool:
    """Whether the same transaction may well succeed when it is run again."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    if isinstance(cause, sqlite3.OperationalError):
        return "locked" in str(cause) or "busy" in str(cause)
    return getattr(cause, "sqlstate", None) in _RETRY_STATES
