"""What the index keeps of a record, read once more: from where it lies, or as facts tell it. It
applies nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable

from archive.dataset.header import scan
from archive.errors import Corrupt, Evicted, InvalidInput, MissError, NotFound, TooLarge
from archive.model import Attributes, Record
from archive.packs.dropping import Absences
from archive.packs.facts import FactLog
from archive.packs.packs import Packs

log = logging.getLogger(__name__)


def read_attributes(packs: Packs, record: Record) -> Attributes | None:
    """What the index keeps of a record, read from its pack; None when its data set can't be read there."""
    try:
        return _read(packs, record)
    except NotFound as error:
        log.error("record %d can't be read from its pack: %s", record.sequence, error)
        return None


def _read(packs: Packs, record: Record) -> Attributes | None:
    try:
        with packs.dataset(record.location) as dataset:
            return scan(dataset, record.head.transfer_syntax_uid)
    except Evicted:  # no damage: facts tell what it was
        return None
    except NotFound:
        raise
    except (InvalidInput, TooLarge, Corrupt) as error:
        log.error("record %d can't be read from its pack: %s", record.sequence, error)
        return None
    except (MissError, OSError, MemoryError):
        raise
    except Exception as error:
        # Whatever it is, one record's header may not keep the index from all that follow it.
        log.error("record %d can't be read from its pack: %s", record.sequence, type(error).__name__)
        return None


def read_or_told(packs: Packs, record: Record, absences: Callable[[], Absences]) -> Attributes | None:
    """The same, also of a content whose bytes were given up: facts tell it."""
    gone: NotFound | None = None
    try:
        found = _read(packs, record)
    except NotFound as error:  # with its pack, of which facts tell what was in it
        found, gone = None, error
    if found is None:
        told = absences().entry_of(record.head.sop_instance_uid, record.digest)
        found = None if told is None else told.attributes
    if found is None and gone is not None:
        log.error("record %d can't be read from its pack: %s", record.sequence, gone)
    return found


class Rereader:
    """Reads attributes again for an open archive. What facts tell is looked up once for all that one batch of
    facts has read again, and then forgotten: of millions of evictions it would be much."""

    def __init__(self, packs: Packs, facts: FactLog) -> None:
        self._packs = packs
        self._facts = facts
        self._absences: Absences | None = None

    def __call__(self, record: Record) -> Attributes | None:
        return read_or_told(self._packs, record, self._told)

    def _told(self) -> Absences:
        if self._absences is None:
            self._absences = Absences.read(self._facts)
        return self._absences

    def forget(self) -> None:
        self._absences = None
