"""Makes the index anew from packs and facts: equal to the one it replaces, which is disposable. It never
touches the ledger, and changes nothing in packs and facts.

An SQLite index is made beside the old one and copied over it in one transaction: who has it open to read
goes on with the old one until then. A PostgreSQL index is emptied and filled again in batches.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, delete
from sqlalchemy.engine import make_url

from archive.archive import ArchiveSettings, lock_state, open_logs
from archive.database import Database, sqlite_url
from archive.errors import MissError
from archive.index.index import Index
from archive.index.schema import STEPS, metadata
from archive.model import START, Position
from archive.packs.storage import FileStorage, Storage
from archive.replay import Replay

log = logging.getLogger(__name__)

_COPY_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class RebuildReport:
    """What went into the new index. `damages` says, one line each, what could not be read."""

    records: int
    facts: int
    damages: tuple[str, ...]
    duration_s: float


def rebuild(settings: ArchiveSettings, *, outbox: bool, storage: Storage | None = None) -> RebuildReport:
    """Rebuild the index of an archive that nobody else writes. Raises Unavailable when somebody does."""
    began = time.monotonic()
    settings.state.mkdir(mode=0o750, parents=True, exist_ok=True)
    lock = lock_state(settings.state)
    used = FileStorage(settings.state) if storage is None else storage
    try:
        replay = _rebuild(settings, used, outbox)
    finally:
        if used is not storage:
            used.close()
        os.close(lock)
    damages = tuple(fact.detail for fact in replay.damages)
    return RebuildReport(replay.records, replay.fact_count, damages, time.monotonic() - began)


def _rebuild(settings: ArchiveSettings, storage: Storage, outbox: bool) -> Replay:
    url = settings.database_url
    packs, facts, watermark = open_logs(settings, storage, *_read_positions(url))
    try:
        path = _sqlite_path(url)
        beside = None if path is None else path.with_name(f"{path.name}.rebuilding")
        if beside is None:
            _empty(url)
            index = Index.open(url)
        else:
            _remove(beside)
            index = Index.open(sqlite_url(beside))
        replay = Replay(index, packs, facts, outbox=outbox)
        try:
            replay.run(START, START)
        finally:
            index.close()
        if path is not None and beside is not None:
            _copy_over(beside, path)
        return replay
    finally:
        packs.close()
        facts.close()
        watermark.close()


def _read_positions(url: str) -> tuple[Position, Position]:
    """How far the old index had read, as far as it still says."""
    try:
        index = Index.open(url)
    except MissError as error:
        log.warning("the old index is of no use: %s", error)
        return START, START
    try:
        return index.positions()
    finally:
        index.close()


def _sqlite_path(url: str) -> Path | None:
    parsed = make_url(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def _empty(url: str) -> None:
    database = Database(url, name="index", steps=STEPS, durable=False)

    def work(connection: Connection) -> None:
        for table in metadata.sorted_tables:
            connection.execute(delete(table))

    try:
        database.write(work)
    finally:
        database.close()


def _copy_over(new: Path, old: Path) -> None:
    """The new index's content in the old one's file, so that readers who have it open see it too."""
    try:
        with (
            contextlib.closing(sqlite3.connect(new)) as source,
            contextlib.closing(sqlite3.connect(old, timeout=_COPY_WAIT_S)) as target,
        ):
            source.backup(target)
    except sqlite3.DatabaseError as error:
        log.warning("the old index is replaced by a new file: %s", error)
        _remove(old)
        new.rename(old)
    _remove(new)


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
