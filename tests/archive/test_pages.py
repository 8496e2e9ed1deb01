"""Pages of studies by place, and what orders rows, under both databases; whatever arrives meanwhile."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from archive.errors import InvalidQuery
from archive.index.index import Index
from archive.model import Level, Match, Position, Query, Scope, StudyPlace
from tests.archive.entries import batches, entry, many

END = Position(1, 1)
STUDIES = Query(Level.STUDY)


@pytest.fixture
def index(database_url: str) -> Iterator[Index]:
    index = Index.open(database_url)
    yield index
    index.close()


def uids(matches: list[Match]) -> list[str]:
    return [match.study["StudyInstanceUID"] for match in matches]


def pages(index: Index, query: Query) -> Iterator[list[Match]]:
    """Each page after the last row of the one before it."""
    while page := index.search(query):
        yield page
        query = replace(query, after=page[-1].place)


@pytest.mark.parametrize("keys", [(), (("PatientName", "*smith*"),), (("StudyDate", "20100101-"),)])
def test_pages_are_the_whole_in_its_order(index: Index, keys: tuple[tuple[str, str], ...]) -> None:
    for batch in batches(many(40, series=2), 20):
        index.apply(batch, END, outbox=True)
    for query in (Query(Level.STUDY, keys), Query(Level.STUDY, keys, pending_only=True),
                  Query(Level.STUDY, keys, Scope(frozenset({"a/one"})))):  # fmt: skip
        whole = uids(index.search(query))
        found = [uid for page in pages(index, replace(query, limit=3)) for uid in uids(page)]
        assert found == whole
        assert [row[2] for row in index.listed(query)] == whole
    assert whole or keys


def test_a_list_that_is_read_on_shows_none_twice_and_misses_none(index: Index) -> None:
    chance = random.Random(4)
    for batch in batches(many(30, seed=1), 10):
        index.apply(batch, END, outbox=True)
    there = uids(index.search(STUDIES))
    seen: list[str] = []
    for number, page in enumerate(pages(index, replace(STUDIES, limit=4))):
        seen += uids(page)
        day = f"20{chance.randrange(10, 26)}0{chance.randrange(1, 10)}15"
        new = entry(f"9.{number}", study=f"9.{number}.1", series=f"9.{number}.1.1")
        dated = replace(new.attributes, study={**new.attributes.study, "StudyDate": day})
        index.apply([replace(new, attributes=dated)], END, outbox=True)
    assert len(seen) == len(set(seen))
    assert [uid for uid in seen if uid in set(there)] == there


def test_equal_dates_and_none_at_all_are_told_apart_by_uid(index: Index) -> None:
    for number in range(5):
        new = entry(f"1.{number}", study=f"1.{number}.1", series=f"1.{number}.1.1")
        study = {key: value for key, value in new.attributes.study.items() if key != "StudyTime"}
        study["StudyDate"] = "" if number < 2 else "20260101"
        index.apply([replace(new, attributes=replace(new.attributes, study=study))], END, outbox=True)
    assert [uids(page) for page in pages(index, replace(STUDIES, limit=1))] == [
        ["1.4.1"], ["1.3.1"], ["1.2.1"], ["1.1.1"], ["1.0.1"],
    ]  # fmt: skip


def test_the_orders_below_studies(index: Index) -> None:
    for batch in batches(many(3, series=3, instances=3), 9):
        index.apply(batch, END, outbox=True)
    series, images = Query(Level.SERIES), Query(Level.IMAGE)
    assert [row[1] for row in index.listed(series)] == [
        match.series["SeriesInstanceUID"] for match in index.search(series)
    ]
    assert [row[1] for row in index.listed(images)] == [
        match.instance["SOPInstanceUID"] for match in index.search(images)
    ]
    assert len(index.listed(replace(images, limit=5, offset=3))) == 5


def test_only_studies_have_a_place(index: Index) -> None:
    place = StudyPlace("20260101", "", "1.2")
    with pytest.raises(InvalidQuery):
        index.search(Query(Level.SERIES, after=place))
    with pytest.raises(InvalidQuery):
        index.listed(Query(Level.PATIENT))
