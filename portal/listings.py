"""Pages by offset that fit together. QIDO-RS pages by `offset` (PS3.18 8.3.4.4), and between two pages
studies arrive: by counting rows anew, a page would show again what the one before it showed. So the first
page of a listing that has more keeps the UIDs of all of it, in order, for 60 s, and later pages are read from
those.

Only UIDs are kept. Each page is asked of the source again, by its UIDs, so that whoever lost a right sees
nothing more, and counts are those of now; a row that is gone leaves its page shorter. Asking for the first
page again begins a new listing. A listing belongs to who asked and to what was asked, and lies in this
process: where several portals serve, the one that gets the next page takes a listing of its own.

Bounds: 100,000 UIDs in a listing (rows behind them are counted anew for each page), 64 listings, 500,000 UIDs
in all of them; the oldest goes first.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from archive.model import Level, Match, Query
from federation.coverage import WardCoverage
from federation.policy import Principal
from federation.source import Answer, Source

LISTING_S = 60.0
LISTING_UIDS_MAX = 100_000
LISTINGS_MAX = 64
UIDS_MAX = 500_000
CUT_UIDS = 500  # of one question: what is asked of a ward is a control message, under 64 KB

KEYWORDS = {
    Level.STUDY: "StudyInstanceUID", Level.SERIES: "SeriesInstanceUID", Level.IMAGE: "SOPInstanceUID",
}  # fmt: skip

Asked = tuple[Principal, Query]


@dataclass(frozen=True, slots=True)
class Paged:
    """A page. `remaining` counts what follows; `exact` is false when there may be more than that."""

    answer: Answer
    remaining: int
    exact: bool = True


@dataclass(frozen=True, slots=True)
class _Listing:
    uids: tuple[str, ...]
    whole: bool
    until_s: float


class Listings:
    """The listings of one portal over its source. Blocking, and safe to use from any thread."""

    def __init__(self, source: Source, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._clock_s = clock_s
        self._kept: OrderedDict[Asked, _Listing] = OrderedDict()
        self._uids = 0
        self._lock = threading.Lock()

    def page(self, principal: Principal, query: Query) -> Paged:
        """The page that the query's limit and offset name."""
        asked = principal, replace(query, limit=None, offset=0)
        kept = self._find(asked) if query.offset else None
        if kept is None:
            return self._begun(asked, principal, query)
        if not kept.whole and query.offset + (query.limit or 0) > len(kept.uids):
            answer = self._source.search(principal, query)
            return Paged(answer, int(answer.more), exact=not answer.more)
        end = None if query.limit is None else query.offset + query.limit
        answer = self._read(principal, query, kept.uids[query.offset : end])
        return Paged(answer, len(kept.uids[end:]) if end is not None else 0, kept.whole)

    def _begun(self, asked: Asked, principal: Principal, query: Query) -> Paged:
        listing = self._source.listing(principal, query, LISTING_UIDS_MAX)
        if not listing.answer.more and not query.offset:
            self._drop(asked)
            return Paged(listing.answer, 0)
        shown = list(dict.fromkeys(_uid(query.level, match) for match in listing.answer.matches))
        # The page was read a moment before the list: what came in between stands behind it.
        others = [uid for uid in listing.uids if uid not in set(shown)]
        uids = (*others[: query.offset], *shown, *others[query.offset :])
        self._keep(asked, _Listing(uids, listing.whole, self._clock_s() + LISTING_S))
        return Paged(listing.answer, max(len(uids) - query.offset - len(shown), 0), listing.whole)

    def _read(self, principal: Principal, query: Query, uids: Sequence[str]) -> Answer:
        """The rows of these UIDs, as far as they are there and may be seen, in this order. What else was
        matched on has been matched: that this study, of whom, stays."""
        keyword = KEYWORDS[query.level]
        bound = tuple(key for key in query.keys if key[0] in KEYWORDS.values() and key[0] != keyword)
        found: list[Match] = []
        coverage: dict[str, WardCoverage] = {}
        for start in range(0, max(len(uids), 1), CUT_UIDS):
            cut = uids[start : start + CUT_UIDS]
            # A page without rows asks for one that nobody has, to say what it covers.
            keys = (*bound, (keyword, "\\".join(cut) or "0"))
            answer = self._source.search(principal, replace(query, keys=keys, limit=None, offset=0))
            found += answer.matches
            for ward in answer.coverage:
                if ward.ward not in coverage or not ward.covered:
                    coverage[ward.ward] = ward
        places = {uid: place for place, uid in enumerate(uids)}
        rows = [match for match in found if _uid(query.level, match) in places]
        rows.sort(key=lambda match: places[_uid(query.level, match)])
        return Answer(rows, list(coverage.values()))

    # What is kept.

    def _find(self, asked: Asked) -> _Listing | None:
        with self._lock:
            kept = self._kept.get(asked)
            return kept if kept is not None and self._clock_s() < kept.until_s else None

    def _keep(self, asked: Asked, listing: _Listing) -> None:
        with self._lock:
            self._forget(asked)
            self._kept[asked] = listing
            self._uids += len(listing.uids)
            while len(self._kept) > LISTINGS_MAX or self._uids > UIDS_MAX:
                self._forget(next(iter(self._kept)))
            now_s = self._clock_s()
            for old in [key for key, kept in self._kept.items() if kept.until_s <= now_s]:
                self._forget(old)

    def _drop(self, asked: Asked) -> None:
        with self._lock:
            self._forget(asked)

    def _forget(self, asked: Asked) -> None:
        if (kept := self._kept.pop(asked, None)) is not None:
            self._uids -= len(kept.uids)


def _uid(level: Level, match: Match) -> str:
    fields = {Level.STUDY: match.study, Level.SERIES: match.series, Level.IMAGE: match.instance}[level]
    return fields[KEYWORDS[level]]
