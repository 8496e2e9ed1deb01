"""Applying records to the index so that one which it can't take does not hold up all that follow. Owns the
judgement whether a failure is a record's own or the index's; it never reads a pack and records no fact.

A record is stepped over when it alone fails, by an error that trying again does not mend, while the index
still takes a made-up record (rolled back). It stays in its pack, and a rebuild by a release that can take it
brings it in.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from archive.database import Unacceptable
from archive.errors import MissError, Unavailable
from archive.index.index import Index
from archive.model import (
    Attributes,
    IndexEntry,
    InstanceHead,
    Location,
    Position,
    Provenance,
    Record,
    RecordKind,
)

log = logging.getLogger(__name__)


def apply_around_poison(
    index: Index, entries: Sequence[IndexEntry], position: Position, *, outbox: bool
) -> list[IndexEntry]:
    """Apply records up to `position`; those that were stepped over. Raises a MissError when the index fails:
    then the same batch is to be tried again."""
    try:
        index.apply(entries, position, outbox=outbox)
        return []
    except Exception as error:
        if not _is_contents_fault(error):
            raise
        if not entries or not _takes_anything(index, outbox):
            raise Unavailable(f"the index takes nothing ({type(error).__name__})") from error
        if len(entries) == 1:
            log.error("record %d can't be indexed: %s", entries[0].record.sequence, type(error).__name__)
            index.apply((), position, outbox=outbox)
            return [entries[0]]
    half = len(entries) // 2
    middle = entries[half - 1].record.end
    poison = apply_around_poison(index, entries[:half], middle, outbox=outbox)
    return poison + apply_around_poison(index, entries[half:], position, outbox=outbox)


def _is_contents_fault(error: Exception) -> bool:
    """Whether what was written may be the cause: refused by the database, or met in our own code."""
    return isinstance(error, Unacceptable) or not isinstance(error, MissError | OSError | MemoryError)


def _takes_anything(index: Index, outbox: bool) -> bool:
    try:
        index.try_out([_MADE_UP], outbox=outbox)
    except MissError as error:
        log.warning("the index does not take a made-up record: %s", error)
    except Exception as error:
        log.error("the index does not take a made-up record: %s", type(error).__name__)
    else:
        return True
    return False


_UID = "2.25.0"
_MADE_UP = IndexEntry(
    Record(
        RecordKind.INSTANCE, 0, InstanceHead(_UID, _UID, _UID, Provenance("", "", "", "", 0)), bytes(32),
        Location("", 0, 0, 0), Position(0, 0),
    ),
    Attributes(
        {"PatientName": "Made^Up", "PatientID": "2.25.0"}, {"StudyInstanceUID": _UID},
        {"SeriesInstanceUID": _UID, "Modality": "OT"}, {"SOPInstanceUID": _UID, "SOPClassUID": _UID},
    ),
)  # fmt: skip
