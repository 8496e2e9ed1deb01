"""What people decide about conflicts: that another content is to be the live one, or that none is. Each
decision is a fact, synced before it counts, with who and when; bytes are touched by none. Handlers of orders
(`archive/orders.py`), safe to repeat."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from archive.archive import Archive
from archive.errors import InvalidInput, NotFound, Unavailable
from archive.index.index import Index
from archive.model import UNDECIDED, ConflictRow, ConflictState, Fact, FactKind, require_uid

log = logging.getLogger(__name__)

ACCEPT, REJECT = "conflict-accept", "conflict-reject"
CONTENTS_MAX = 1_000
_BY_CHARS_MAX = 100
_LATER = "; the index does not answer and follows later"


class Decisions:
    """Decisions on the conflicts of one archive, which this process writes."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    def accept(self, detail: Mapping[str, str], by: str) -> str:
        """Make a content the live one of its UID. Raises NotFound, InvalidInput; Corrupt when its bytes are
        not what came."""
        uid, digest = _named(detail)
        self._archive.wait_indexed()
        index = self._archive.index
        live = index.live(uid)
        if live is not None and live.digest == digest:
            return f"{uid} is served with this content already"
        (row,) = _of(contents(index, uid), digest)
        self._archive.packs.verify(row.head, row.other_digest, row.location)
        words = self._record(FactKind.ACCEPTED, row, by)
        log.info("%s: another content is served from now on, as %s decided", uid, by)
        return f"{uid} is served with the other content now; the first is kept{words}"

    def reject(self, detail: Mapping[str, str], by: str) -> str:
        """Close a conflict: the content stays kept, and nobody is asked again."""
        uid, digest = _named(detail)
        self._archive.wait_indexed()
        (row,) = _of(contents(self._archive.index, uid), digest)
        if row.state is ConflictState.REJECTED:
            return f"{uid}: this content was rejected already"
        if row.state not in UNDECIDED:
            raise InvalidInput(f"this content waits for no decision: it is {row.state.value}")
        words = self._record(FactKind.REJECTED, row, by)
        log.info("%s: a conflict is closed, as %s decided", uid, by)
        return f"{uid}: rejected, and kept{words}"

    def _record(self, kind: FactKind, row: ConflictRow, by: str) -> str:
        now_us = time.time_ns() // 1000
        fact = Fact(kind, row.sop_instance_uid, row.other_digest, row.ward, now_us, by[:_BY_CHARS_MAX])
        try:
            self._archive.record_facts([fact])
        except Unavailable:
            return _LATER
        return ""


def choose(index: Index, uid: str, digest: str) -> ConflictRow:
    """The kept content of `uid` that a person means: whose digest begins so, or the one that waits for a
    decision when only one does. Raises NotFound, InvalidInput with what there is."""
    rows = contents(index, uid)
    live = index.live(uid) if digest else None
    if live is not None and live.digest.hex().startswith(digest.lower()):
        raise InvalidInput(f"this content is the one that is served; others are kept: {_listed(rows)}")
    if digest:
        return _one(_of_prefix(rows, digest.lower()), "begin with these digits")
    waiting = [row for row in rows if row.state in UNDECIDED]
    if not waiting and len(rows) > 1:
        raise InvalidInput("none of these waits for a decision, name one by its digest: " + _listed(rows))
    return _one(waiting or rows, "wait for a decision")


def contents(index: Index, uid: str) -> list[ConflictRow]:
    """Everything that is kept under a UID beside the live content; NotFound when nothing is."""
    rows = index.conflicts(CONTENTS_MAX, states=list(ConflictState), uid=uid)
    if not rows:
        raise NotFound(f"nothing is kept under {uid} beside what is served")
    return rows


def _one(rows: Sequence[ConflictRow], what: str) -> ConflictRow:
    if len(rows) != 1:
        raise InvalidInput(f"{len(rows)} contents {what}, name one by its digest: {_listed(rows)}")
    return rows[0]


def _of_prefix(rows: Sequence[ConflictRow], digest: str) -> list[ConflictRow]:
    found = [row for row in rows if row.other_digest.hex().startswith(digest)]
    if not found:
        raise NotFound(f"no content with this digest is kept; there are: {_listed(rows)}")
    return found


def _of(rows: Sequence[ConflictRow], digest: bytes) -> list[ConflictRow]:
    return _of_prefix(rows, digest.hex())


def _listed(rows: Sequence[ConflictRow]) -> str:
    return ", ".join(f"{row.other_digest.hex()[:12]} ({row.state.value})" for row in rows[:20])


def _named(detail: Mapping[str, str]) -> tuple[str, bytes]:
    """The content that an order is about: its UID and its whole digest."""
    try:
        uid, digest = detail["uid"], bytes.fromhex(detail["digest"])
    except (KeyError, ValueError):
        raise InvalidInput("an order about a conflict names a UID and a digest") from None
    if len(digest) != 32:
        raise InvalidInput("a digest has 64 hex digits")
    return require_uid(uid, "the SOP Instance UID"), digest
