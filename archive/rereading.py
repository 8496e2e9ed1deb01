"""What the index keeps of a record, read once more: from where it lies, or as facts tell it. It
applies nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable

from archive.dataset.header import scan
from archive.errors import Corrupt, Evicted, InvalidInput, MissError, NotFound, TooLarge
from archive.model import Attributes, Record
from archive.packs.dropping import Absences
from archive.packs.packs import Packs

log = logging.getLogger(__name__)


def read_attributes(packs: Packs, record: Record) -> Attributes | None:
    """What the index keeps of a record, read from its pack; None when its data set can't be read there."""
    try:
        with packs.dataset(record.location) as dataset:
            return scan(dataset, record.head.transfer_syntax_uid)
    except Evicted:  # no damage: facts tell what it was
        return None
    except (InvalidInput, TooLarge, Corrupt, NotFound) as error:
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
    found = read_attributes(packs, record)
    if found is None:
        told = absences().entry_of(record.head.sop_instance_uid, record.digest)
        found = None if told is None else told.attributes
    return found
