"""Pages by offset of one listing: they fit together whatever arrives, rights are decided for each, and what
is kept of them is bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from starlette.testclient import TestClient

from archive.archive import Archive
from archive.model import Level, Match, Query
from federation.policy import Principal, Role
from federation.source import Answer, Listing, Source
from portal import listings
from portal.listings import LISTING_S, Listings
from tests.datasets import make_instance
from tests.portal.portals import (
    AppMaker,
    ArchiveSource,
    EmptySource,
    provenance,
    signed_in,
    take_in,
)
from tests.portal.test_qido import GASLINI, JSON, ROOT, uids

EVA, OTTO = Principal("eva", Role.PHYSICIAN), Principal("otto", Role.PHYSICIAN)
STUDIES = Query(Level.STUDY, limit=2)


@dataclass
class Growing(EmptySource):
    """Studies in an order, of which more may arrive, and some may no longer be seen."""

    uids: list[str] = field(default_factory=list)
    hidden: set[str] = field(default_factory=set)
    listed: int = 0

    def search(self, principal: Principal, query: Query) -> Answer:
        named = dict(query.keys).get("StudyInstanceUID", "")
        wanted = set(named.split("\\")) if named else set(self.uids)
        seen = [uid for uid in self.uids if uid in wanted and uid not in self.hidden]
        end = None if query.limit is None else query.offset + query.limit
        rows = [Match(Level.STUDY, "I", {}, {"StudyInstanceUID": uid}) for uid in seen[query.offset : end]]
        return Answer(rows, list(self.wards), end is not None and len(seen) > end)

    def listing(self, principal: Principal, query: Query, most: int) -> Listing:
        self.listed += 1
        seen = [uid for uid in self.uids if uid not in self.hidden]
        answer = self.search(principal, query)
        if not answer.more and not query.offset:
            return Listing(answer)
        return Listing(answer, tuple(seen[:most]), len(seen) <= most)


def source_of(*, count: int = 7) -> tuple[Growing, Source]:
    growing = Growing(uids=[f"1.{number}" for number in range(count)])
    return growing, growing


def shown(matches: Sequence[Match]) -> list[str]:
    return [match.study["StudyInstanceUID"] for match in matches]


def read(kept: Listings, offset: int, who: Principal = EVA, limit: int = 2) -> list[str]:
    return shown(kept.page(who, replace(STUDIES, offset=offset, limit=limit)).answer.matches)


def test_pages_fit_together_though_studies_arrive_between_them() -> None:
    growing, source = source_of()
    kept = Listings(source)
    there = list(growing.uids)
    seen = []
    for offset in range(0, 8, 2):
        seen += read(kept, offset)
        growing.uids.insert(0, f"2.{offset}")
    assert seen == there and growing.listed == 1
    assert read(kept, 0) == ["2.6", "2.4"]  # the first page again begins anew
    assert read(kept, 2) == ["2.2", "2.0"]
    page = kept.page(EVA, replace(STUDIES, offset=4))
    assert (page.remaining, page.exact) == (5, True)


def test_a_page_that_is_all_there_is_keeps_nothing() -> None:
    growing, source = source_of(count=2)
    kept = Listings(source)
    assert read(kept, 0) == ["1.0", "1.1"] and not kept._kept
    assert kept.page(EVA, STUDIES).remaining == 0
    assert read(kept, 2) == []


def test_what_may_no_longer_be_seen_is_not_shown_on_a_later_page() -> None:
    growing, source = source_of()
    kept = Listings(source)
    read(kept, 0)
    growing.hidden = {"1.2"}
    assert read(kept, 2) == ["1.3"] and read(kept, 4) == ["1.4", "1.5"]


def test_a_listing_is_of_who_asked_and_of_what_was_asked_for_a_minute() -> None:
    growing, source = source_of()
    now = [0.0]
    kept = Listings(source, lambda: now[0])
    read(kept, 0)
    growing.uids.insert(0, "2.1")
    assert read(kept, 2, OTTO) == ["1.1", "1.2"]  # another's is made for them, at their first page
    assert read(kept, 2) == ["1.2", "1.3"]
    named = replace(STUDIES, keys=(("PatientName", "x"),), offset=2)
    assert shown(kept.page(EVA, named).answer.matches) == ["1.1", "1.2"]
    now[0] = LISTING_S + 1
    assert read(kept, 2) == ["1.1", "1.2"]
    assert len(kept._kept) == 1  # those that are too old are gone


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "LISTINGS_MAX", 2)
    growing, source = source_of()
    kept = Listings(source)
    for name in ("a", "b", "c"):
        read(kept, 0, Principal(name, Role.PHYSICIAN))
    assert len(kept._kept) == 2 and kept._uids == 14
    monkeypatch.setattr(listings, "UIDS_MAX", 10)
    read(kept, 0, OTTO)
    assert len(kept._kept) == 1 and kept._uids == 7
    monkeypatch.setattr(listings, "LISTING_UIDS_MAX", 4)
    page = kept.page(EVA, STUDIES)
    assert (page.remaining, page.exact) == (2, False)
    assert read(kept, 2) == ["1.2", "1.3"] and read(kept, 4) == ["1.4", "1.5"]


def test_qido_pages_of_an_archive_that_grows(make_app: AppMaker, archive: Archive) -> None:
    client: TestClient = signed_in(make_app(ArchiveSource(archive)), "doc")
    take_in(archive, [make_instance(StudyDate=f"2026010{day}") for day in range(1, 6)])
    there = uids(client, "/studies")
    seen = []
    for offset in (0, 2, 4):
        response = client.get(f"{ROOT}/studies?limit=2&offset={offset}", headers=JSON)
        left = 3 - offset
        assert ("additional results" in response.headers.get("warning", "")) == (left > 0)
        seen += [row["0020000D"]["Value"][0] for row in response.json()]
        take_in(archive, [make_instance(StudyDate="20260201"), make_instance(StudyDate="20250101")])
    assert seen == there
    # At the levels below, too, within the study of the path.
    take_in(archive, [make_instance(study_uid="1.2.3", series_uid="1.2.3.1", number=n) for n in range(1, 6)])
    found = []
    for offset in (0, 2, 4):
        rows = client.get(f"{ROOT}/studies/1.2.3/instances?limit=2&offset={offset}", headers=JSON).json()
        found += [row["00080018"]["Value"][0] for row in rows]
        take_in(archive, [make_instance(study_uid="1.2.3", series_uid="1.2.3.1", number=-offset)])
    assert len(found) == len(set(found)) == 5


def test_a_technician_s_pages_hold_their_own_ward_alone(make_app: AppMaker, archive: Archive) -> None:
    take_in(archive, [make_instance(StudyDate=f"2026010{day}") for day in range(1, 5)])
    take_in(archive, [make_instance(StudyDate="20260103")], provenance(GASLINI, "GASLINI"))
    app = make_app(ArchiveSource(archive))
    doc, tech = signed_in(app, "doc"), signed_in(app, "tech")
    assert len(uids(doc, "/studies?limit=2") + uids(doc, "/studies?limit=3&offset=2")) == 5
    assert len(uids(tech, "/studies?limit=2") + uids(tech, "/studies?limit=3&offset=2")) == 4
