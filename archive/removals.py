"""Removals: that a study, a series or an instance is no longer shown, as facts that both sides of a line
know.

A removal is a REMOVED fact; a RESTORED fact undoes it, a PURGED fact says that its bytes are given back. All
three name the removal by its id, so each may come again and in any order. The fact's UID is that of the
level, its ward the one where it was decided, "" for the region. What they do to the index is up to
`index/removed.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from archive.errors import Corrupt, InvalidInput
from archive.model import Fact, FactKind, Level, is_uid, require_uid

LEVELS = (Level.STUDY, Level.SERIES, Level.IMAGE)
REMOVAL_KINDS = frozenset({FactKind.REMOVED, FactKind.RESTORED, FactKind.PURGED})

QUALITY, SAFETY, WORKLIST, EXPIRED = "113001", "113037", "113038", "113039"
CODES = {  # titles of rejection notes (DCM, IHE RAD TF-3 4.66); "" is an administrative deletion
    QUALITY: "rejected for quality reasons",
    SAFETY: "rejected for patient safety reasons",
    WORKLIST: "incorrect modality worklist entry",
    EXPIRED: "data retention policy expired",
}
GIVEN_UP = "purged"  # the detail of an EVICTED fact about what was removed: nobody has the bytes for it
DELETES = ("", EXPIRED)  # these mean that the bytes are to go; the others only hide

REASON_CHARS_MAX = 200
BY_CHARS_MAX = 100
_ID = re.compile(r"[!-~]{1,64}", re.ASCII)  # it is a key of the index: not any text fits there
ORDER_DIGITS = 16  # of an id: those of one note or one command begin alike


@dataclass(frozen=True, slots=True)
class Removal:
    """That what lies under `uid` at its level is no longer shown. At study and series level it covers what
    was received before `at_us`, at instance level whatever comes. `code` is one of CODES, or "". `study_uid`
    is "" where nobody knew it."""

    id: str
    level: Level
    uid: str
    study_uid: str
    code: str
    by: str
    reason: str
    at_us: int
    ward: str

    @property
    def order(self) -> str:
        """What all removals of one note or one command have in common."""
        return self.id[:ORDER_DIGITS]


@dataclass(frozen=True, slots=True)
class Restoration:
    """That a removal was undone. `uid` is the removal's."""

    removal: str
    uid: str
    by: str
    at_us: int
    ward: str


@dataclass(frozen=True, slots=True)
class Purge:
    """That what a removal covers gives its bytes back. `uid` is the removal's."""

    removal: str
    uid: str
    by: str
    at_us: int
    ward: str


def new_order() -> str:
    """The beginning of the ids of one command's removals."""
    return secrets.token_hex(ORDER_DIGITS // 2)


def order_of_note(sop_instance_uid: str, digest: bytes) -> str:
    """The same of a rejection note: whoever reads the note comes to it."""
    return hashlib.sha256(b"note\0" + sop_instance_uid.encode() + b"\0" + digest).hexdigest()[:ORDER_DIGITS]


def removal_id(order: str, uid: str) -> str:
    return order + hashlib.sha256(uid.encode()).hexdigest()[:ORDER_DIGITS]


def fact_of(removal: Removal) -> Fact:
    """Raises InvalidInput when it is no removal that may be told."""
    require_uid(removal.uid, "what is removed")
    if removal.level not in LEVELS or (removal.code and removal.code not in CODES):
        raise InvalidInput("no such level, or no such code, of a removal")
    body = {
        "id": removal.id, "level": removal.level.value, "study": removal.study_uid, "code": removal.code,
        "by": removal.by[:BY_CHARS_MAX], "reason": removal.reason[:REASON_CHARS_MAX],
    }  # fmt: skip
    return _fact(FactKind.REMOVED, removal.uid, removal.ward, removal.at_us, body)


def removal_of(fact: Fact) -> Removal:
    """Raises Corrupt when it says nothing that can be read."""
    body = _body(fact, FactKind.REMOVED)
    try:
        level = Level(body["level"])
        if level not in LEVELS:
            raise ValueError(level)
        study = str(body["study"])
        if study and not is_uid(study):
            raise ValueError("no study has such a UID")
        return Removal(
            _named(body), level, fact.sop_instance_uid, study, str(body["code"]),
            str(body["by"]), str(body["reason"]), fact.at_us, fact.ward,
        )  # fmt: skip
    except (KeyError, ValueError) as error:
        raise Corrupt("a fact about a removal can't be read") from error


def fact_of_restoration(restoration: Restoration) -> Fact:
    return _fact_about(FactKind.RESTORED, restoration)


def restoration_of(fact: Fact) -> Restoration:
    body = _body(fact, FactKind.RESTORED)
    return Restoration(_named(body), fact.sop_instance_uid, str(body.get("by", "")), fact.at_us, fact.ward)


def fact_of_purge(purge: Purge) -> Fact:
    return _fact_about(FactKind.PURGED, purge)


def purge_of(fact: Fact) -> Purge:
    body = _body(fact, FactKind.PURGED)
    return Purge(_named(body), fact.sop_instance_uid, str(body.get("by", "")), fact.at_us, fact.ward)


def _fact_about(kind: FactKind, said: Restoration | Purge) -> Fact:
    body = {"id": said.removal, "by": said.by[:BY_CHARS_MAX]}
    return _fact(kind, said.uid, said.ward, said.at_us, body)


def _fact(kind: FactKind, uid: str, ward: str, at_us: int, body: Mapping[str, str]) -> Fact:
    return Fact(kind, uid, b"", ward, at_us, json.dumps(body, separators=(",", ":"), ensure_ascii=False))


def _body(fact: Fact, kind: FactKind) -> Mapping[str, Any]:
    if fact.kind is not kind:
        raise Corrupt(f"no fact of the kind {kind.value}")
    try:
        body = json.loads(fact.detail)
    except (ValueError, RecursionError) as error:
        raise Corrupt("a fact about a removal can't be read") from error
    if not isinstance(body, dict):
        raise Corrupt("a fact about a removal can't be read")
    return body


def _named(body: Mapping[str, Any]) -> str:
    named = body.get("id")
    if not isinstance(named, str) or not _ID.fullmatch(named):
        raise Corrupt("a fact about a removal names none")
    return named
