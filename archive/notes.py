"""Rejection notes (IHE IOCM): what a key object selection with such a title says, as removals. The indexer
asks of every batch before it brings it in, so that a note has taken effect when a search may find it, and a
crash between its answer and its effect leaves it to be asked again. It records nothing itself.

What a note makes is the same wherever it is read: a ward and the region come to the same removals. Which are
left out may differ: the region asks whose the instances are, and each side its own retention.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from archive.dataset.keyobjects import (
    DOCUMENT_BYTES_MAX,
    KEY_OBJECTS,
    KeyObjects,
    Reference,
    read_key_objects,
)
from archive.errors import MissError
from archive.index.index import Index
from archive.model import Fact, IndexEntry, Level, Record, RecordKind
from archive.packs.packs import Packs
from archive.removals import CODES, EXPIRED, QUALITY, Removal, fact_of, order_of_note, removal_id
from archive.retention import RemovalSettings, RetentionSettings

log = logging.getLogger(__name__)

_TITLE = "ConceptNameCodeSequence.CodeValue"
_SCHEME = "DCM"


class RejectionNotes:
    """See the module's docstring. One thread uses it."""

    def __init__(
        self, packs: Packs, index: Index, settings: RemovalSettings, retention: RetentionSettings,
        *, region: bool = False, clock: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:  # fmt: skip
        self._packs = packs
        self._index = index
        self._settings = settings
        self._retention = retention
        self._region = region
        self._clock = clock

    def facts(self, entries: Sequence[IndexEntry]) -> list[Fact]:
        """The removals of the notes among what is about to be indexed; those that are known are left out."""
        facts: list[Fact] = []
        for entry in entries:
            if entry.record.head.sop_class_uid == KEY_OBJECTS and self._is_note(entry):
                facts += self._of_note(entry)
        return facts

    def _is_note(self, entry: IndexEntry) -> bool:
        code, record = entry.attributes.instance.get(_TITLE, ""), entry.record
        if code not in CODES or record.kind is not RecordKind.INSTANCE or not self._settings.rejection_notes:
            return False
        if code == QUALITY and self._settings.shows_quality_rejected:
            return False
        if record.head.provenance.device in self._settings.no_notes_from:
            log.warning("a rejection note of %s is kept and not obeyed", record.head.provenance.device)
            return False
        return True

    def _of_note(self, entry: IndexEntry) -> list[Fact]:
        record = entry.record
        note = self._read(record)
        if note is None or note.scheme != _SCHEME or note.code not in CODES:
            return []
        references = list(note.references)
        if self._region:
            references = self._own(references, record.head.provenance.ward)
        if note.code == EXPIRED:
            references = self._expired(references)
        removals = [_removal(record, note.code, each) for each in references]
        if removals and note.code != QUALITY:  # then the note is not given out either
            own = Reference(entry.attributes.study_uid, record.head.sop_instance_uid)
            removals.append(_removal(record, note.code, own))
        if not removals:
            return []
        order = order_of_note(record.head.sop_instance_uid, record.digest)
        known = {one.removal.id for one in self._index.removals(len(removals), prefix=order)}
        log.info("a rejection note of %s (%s) is about %d instances", record.head.provenance.device,
                 note.code, len(references))  # fmt: skip
        return [fact_of(each) for each in removals if each.id not in known]

    def _read(self, record: Record) -> KeyObjects | None:
        if record.location.length > DOCUMENT_BYTES_MAX:
            log.error("a rejection note of %d bytes is kept and not obeyed", record.location.length)
            return None
        try:
            with self._packs.open_payload(record.location) as payload:
                return read_key_objects(payload)
        except MissError as error:
            log.error("a rejection note is kept and not obeyed: %s", error)
            return None

    def _own(self, references: Sequence[Reference], ward: str) -> list[Reference]:
        """In the region a ward rejects what it holds, or nobody has yet."""
        holders = self._index.holders(each.sop_instance_uid for each in references)
        own = [each for each in references if ward in holders.get(each.sop_instance_uid, {ward})]
        if len(own) < len(references):
            log.warning("a rejection note of %s names %d instances of other wards: they stay", ward,
                        len(references) - len(own))  # fmt: skip
        return own

    def _expired(self, references: Sequence[Reference]) -> list[Reference]:
        """Those whose retention has passed; the others, and what is not here, stay as they are."""
        described = self._index.described(each.sop_instance_uid for each in references)
        now_us = self._clock()
        passed = {
            one.stored.head.sop_instance_uid
            for one in described
            if self._retention.ends_us(one.fields, one.stored.head.provenance.received_at_us) <= now_us
        }
        if len(passed) < len(references):
            log.warning("a rejection note (%s) names %d instances that are inside retention or not here: "
                        "they stay", EXPIRED, len(references) - len(passed))  # fmt: skip
        return [each for each in references if each.sop_instance_uid in passed]


def _removal(record: Record, code: str, what: Reference) -> Removal:
    source = record.head.provenance
    order = order_of_note(record.head.sop_instance_uid, record.digest)
    return Removal(
        removal_id(order, what.sop_instance_uid), Level.IMAGE, what.sop_instance_uid, what.study_uid, code,
        f"device {source.device}", f"rejection note {record.head.sop_instance_uid}", source.received_at_us,
        source.ward,
    )  # fmt: skip
