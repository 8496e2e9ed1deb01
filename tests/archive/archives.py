"""Archives for tests: small reserves, and instances sent into them as a service would."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from archive.archive import Archive, ArchiveSettings
from archive.intake import Ticket
from archive.model import Outcome, Provenance
from tests.datasets import PROVENANCE, Instance


def settings_for(state: Path, **changes: Any) -> ArchiveSettings:
    """An archive in `state` that does not ask for a gigabyte of free disk."""
    return replace(ArchiveSettings(state=state, free_bytes_min=0), **changes)


def send(
    archive: Archive,
    instance: Instance,
    *,
    provenance: Provenance = PROVENANCE,
    piece_bytes: int = 4096,
    conflict: bool = False,
) -> Ticket:
    """Take an instance in, piece by piece; what was decided, not waited for."""
    reception = archive.intake.begin(instance.head(provenance), conflict=conflict)
    for start in range(0, len(instance.dataset), piece_bytes):
        reception.write(memoryview(instance.dataset)[start : start + piece_bytes])
    return reception.commit()


def store(archive: Archive, instance: Instance, **options: Any) -> Outcome:
    """Take an instance in and wait until it may be acknowledged."""
    ticket = send(archive, instance, **options)
    ticket.wait_durable()
    return ticket.outcome


def stored_bytes(archive: Archive, instance: Instance) -> bytes:
    """The data set as the archive gives it back."""
    (found,) = archive.instances(instance.study_uid, None, instance.sop_instance_uid)
    with archive.open_payload(found.location) as payload:
        whole = payload.read()
    assert whole[found.location.dataset_offset :] == b"".join(archive.dataset_chunks(found.location))
    archive.verify(found)
    return whole[found.location.dataset_offset :]


def abandon(archive: Archive) -> None:
    """Leave an archive as a crash does, as far as one can inside a process: its threads end, and nothing is
    synced, marked or sealed any more."""
    writing = archive._writing
    assert writing is not None
    writing.sorter.stop()
    writing.upkeep.close()
    writing.indexer.close()
    os.close(writing._lock)
    archive.index.close()
