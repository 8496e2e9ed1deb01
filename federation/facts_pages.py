"""Facts that travel, out of one archive's log and into another's. Both ends of a line use it: what is read is
read from a place on, never from the beginning again, and what is taken is taken once, however often it is
told. A page is bounded by number and bytes; a batch that is larger is told in several."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from archive.archive import Archive
from archive.corrections import correction_of
from archive.errors import MissError
from archive.index.travel import TRAVELLING, Cursor
from archive.model import START, Fact, FactKind, Position
from archive.removals import purge_of, removal_of, restoration_of

log = logging.getLogger(__name__)

PAGE_FACTS_MAX = 500
PAGE_BYTES_MAX = 1 << 20
_FACT_BYTES = 200  # of one beside its detail

Choice = Callable[[Sequence[Fact]], Sequence[Fact]]

_READERS: dict[FactKind, Callable[[Fact], object]] = {
    FactKind.REMOVED: removal_of,
    FactKind.RESTORED: restoration_of,
    FactKind.PURGED: purge_of,
    FactKind.CORRECTED: correction_of,
}


@dataclass(frozen=True, slots=True)
class Page:
    """Facts in their order. `cursor` is where they end; None within a batch. `last` says that the log was
    read to its end."""

    facts: tuple[Fact, ...]
    cursor: Cursor | None
    last: bool = False


def pages(archive: Archive, cursor: Cursor, choose: Choice) -> Iterator[Page]:
    """What the log holds beyond a cursor of it and `choose` takes; a cursor of another log, or of one that
    was put back since, is one of nothing. The last page may be empty: its cursor lies beyond all that does
    not travel."""
    facts, here = archive.facts, known_place(archive, cursor)
    end = facts.end
    gathered: list[Fact] = []
    for batch in facts.read(here, kinds=TRAVELLING):
        chosen = list(choose([fact for fact in batch.facts if fact.kind in TRAVELLING]))
        if gathered and _is_more_than_a_page([*gathered, *chosen]):
            yield Page(tuple(gathered), _cursor(archive, here))
            gathered = []
        *whole, rest = list(cut(chosen)) or [()]
        for piece in whole:
            yield Page(tuple(piece), None)
        gathered += rest
        here = batch.end
    yield Page(tuple(gathered), _cursor(archive, max(here, end)), last=True)


def cut(facts: Sequence[Fact]) -> Iterator[Sequence[Fact]]:
    """Facts in pieces that fit a page each."""
    piece: list[Fact] = []
    for fact in facts:
        if piece and _is_more_than_a_page([*piece, fact]):
            yield piece
            piece = []
        piece.append(fact)
    if piece:
        yield piece


def _is_more_than_a_page(facts: Sequence[Fact]) -> bool:
    return len(facts) > PAGE_FACTS_MAX or sum(map(_bytes_of, facts)) > PAGE_BYTES_MAX


def _bytes_of(fact: Fact) -> int:
    return _FACT_BYTES + len(fact.detail.encode("utf-8", "replace"))


def known_place(archive: Archive, cursor: Cursor) -> Position:
    """Where a cursor stands in this log: at its beginning when it is of another one."""
    facts, place = archive.facts, cursor.position
    if cursor.log != archive.epoch or place > facts.end or facts.seal_at(place) != cursor.seal:
        return START
    return place


def _cursor(archive: Archive, place: Position) -> Cursor:
    return Cursor(archive.epoch, place, archive.facts.seal_at(place))


def is_readable(fact: Fact) -> bool:
    """Whether this release understands it."""
    try:
        _READERS[fact.kind](fact)
    except MissError:
        return False
    return True


def take(archive: Archive, facts: Iterable[Fact]) -> int:
    """Record what is not known here, and apply it; how many facts that were. Raises what recording does."""
    readable = [fact for fact in facts if is_readable(fact)]
    archive.wait_indexed()
    fresh = archive.index.travel.unknown(readable)
    archive.record_facts(fresh)
    return len(fresh)


def keep_cursor(archive: Archive, teller: str, cursor: Cursor, *, whole: bool = False) -> None:
    """A teller's facts are recorded here as far as this."""
    archive.index.travel.keep_cursor(teller, replace(cursor, whole=whole))
