"""The merge against its own definition: build the rows of the whole region from every instance at once, and
the merged answer of region and wards must be the same, whatever lies where and whatever moved while it was
asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from archive.model import Level, Match, SeriesHolding, StudyPlace
from federation.fanout import (
    Held,
    WardMatches,
    in_order,
    listing,
    merge,
    series_of,
    standing_of,
    studies_of,
    uids_of,
)

WARDS = ("a/ct", "a/mr", "b/ct")


@dataclass(frozen=True)
class Image:
    """One instance of the model: where it is, and whether the wards that hold it have a receipt."""

    study: int
    series: int
    number: int
    region: bool
    holders: frozenset[str]
    pending: frozenset[str]

    @property
    def uid(self) -> str:
        return f"1.{self.study}.{self.series}.{self.number}"

    @property
    def series_uid(self) -> str:
        return f"1.{self.study}.{self.series}"

    @property
    def study_uid(self) -> str:
        return f"1.{self.study}"

    @property
    def modality(self) -> str:
        return ("CT", "MR", "US")[self.series % 3]


def images(draw_max: int = 14) -> st.SearchStrategy[list[Image]]:
    places = st.sets(st.sampled_from(WARDS), min_size=1).flatmap(
        lambda holders: st.tuples(
            st.just(frozenset(holders)),
            st.sets(st.sampled_from(sorted(holders))).map(frozenset),
            st.booleans(),
        )
    )
    one = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), places)
    many = st.lists(one, max_size=draw_max, unique_by=lambda parts: parts[:3])
    return many.map(
        lambda rows: [_image(study, series, number, place) for study, series, number, place in rows]
    )


def _image(study: int, series: int, number: int, place: tuple[frozenset[str], frozenset[str], bool]) -> Image:
    holders, pending, region = place
    # Without a receipt at any ward it can't be in the region unless it has just arrived; somebody must have
    # it.
    return Image(study, series, number, region or not pending, holders, pending)


def row(level: Level, group: Iterable[Image], wards: frozenset[str], *, holdings: bool = False) -> Match:
    group = list(group)
    one = group[0]
    by_series: dict[str, list[Image]] = defaultdict(list)
    for image in group:
        by_series[image.series_uid].append(image)
    return Match(
        level=level,
        issuer="H",
        patient={"PatientID": f"P{one.study % 2}"},
        study={}
        if level is Level.PATIENT
        else {"StudyInstanceUID": one.study_uid, "StudyDate": f"2020010{one.study}"},
        series={"SeriesInstanceUID": one.series_uid, "SeriesNumber": str(one.series)}
        if level in (Level.SERIES, Level.IMAGE)
        else {},
        instance={"SOPInstanceUID": one.uid, "InstanceNumber": str(one.number)}
        if level is Level.IMAGE
        else {},
        modalities=tuple(sorted({image.modality for image in group})),
        series_count=0 if level in (Level.SERIES, Level.IMAGE) else len(by_series),
        instance_count=len(group),
        study_count=len({image.study for image in group}),
        wards=tuple(sorted(wards)),
        holdings=tuple(
            SeriesHolding(series, members[0].modality, tuple(image.uid for image in members))
            for series, members in sorted(by_series.items())
        )
        if holdings
        else (),
    )


def grouped(level: Level, every: Iterable[Image]) -> list[list[Image]]:
    groups: dict[object, list[Image]] = defaultdict(list)
    for image in every:
        key = {
            Level.PATIENT: image.study % 2,
            Level.STUDY: image.study,
            Level.SERIES: image.series_uid,
            Level.IMAGE: image.uid,
        }[level]
        groups[key].append(image)
    return [sorted(group, key=lambda image: image.uid) for group in groups.values()]


def rows_of(level: Level, every: list[Image], who: str) -> list[Match]:
    """`who` is a ward (its pending instances), "region" (what it has) or "all" (the truth)."""
    if who == "region":
        seen = [image for image in every if image.region]
    elif who == "all":
        seen = [image for image in every if image.region or image.pending]
    else:
        seen = [image for image in every if who in image.pending]
    rows = []
    for group in grouped(level, seen):
        wards = frozenset[str]().union(*(image.holders if image.region else image.pending for image in group))
        rows.append(row(level, group, wards if who not in WARDS else frozenset({who}), holdings=who in WARDS))
    return in_order(level, rows)


def summary(match: Match) -> tuple[object, ...]:
    return (
        match.study.get("StudyInstanceUID"),
        match.series.get("SeriesInstanceUID"),
        match.instance.get("SOPInstanceUID"),
        match.modalities,
        match.study_count,
        match.series_count,
        match.instance_count,
    )


def answers(level: Level, every: list[Image]) -> list[WardMatches]:
    asked = Level.STUDY if level is Level.PATIENT else level
    return [WardMatches(ward, tuple(rows_of(asked, every, ward))) for ward in WARDS]


def held_of(every: list[Image], wards: list[WardMatches]) -> Held:
    region = [image for image in every if image.region]
    return Held(
        frozenset(image.uid for image in region) & uids_of(wards),
        frozenset(image.series_uid for image in region) & series_of(wards),
        frozenset(image.study_uid for image in region) & studies_of(wards),
    )


@settings(max_examples=300, deadline=None)
@given(images(), st.sampled_from(list(Level)))
def test_the_merge_is_the_union(every: list[Image], level: Level) -> None:
    wards = answers(level, every)
    region = rows_of(level, every, "region")
    page = merge(level, region, wards, held_of(every, wards))
    truth = rows_of(level, every, "all")
    assert [summary(match) for match in page.matches] == [summary(match) for match in truth]
    assert not page.more
    assert all(not match.holdings for match in page.matches)
    alone = {ward for image in every if not image.region for ward in image.pending}
    assert {ward for match in page.matches for ward in match.pending_at} == alone
    for merged, whole in zip(page.matches, truth, strict=True):
        assert set(merged.wards) >= set(whole.wards)


@settings(max_examples=100, deadline=None)
@given(images(20), st.integers(0, 6), st.integers(1, 4))
def test_pages_of_the_merge_are_cuts_of_the_whole(every: list[Image], offset: int, limit: int) -> None:
    wards = answers(Level.IMAGE, every)
    held = held_of(every, wards)
    whole = merge(Level.IMAGE, rows_of(Level.IMAGE, every, "region"), wards, held).matches
    reach = offset + limit + 1
    wide_enough = rows_of(Level.IMAGE, every, "region")[:reach]
    listed = {match.instance["SOPInstanceUID"] for answer in wards for match in answer.matches}
    wide_enough += [
        match
        for match in rows_of(Level.IMAGE, every, "region")[reach:]
        if match.instance["SOPInstanceUID"] in listed
    ]
    page = merge(Level.IMAGE, wide_enough, wards, held, limit=limit, offset=offset)
    assert [summary(m) for m in page.matches] == [summary(m) for m in whole[offset : offset + limit]]
    assert page.more == (len(whole) > offset + limit)


@settings(max_examples=100, deadline=None)
@given(images(20), st.integers(1, 4))
def test_pages_by_place_are_cuts_of_the_whole(every: list[Image], limit: int) -> None:
    wards = answers(Level.STUDY, every)
    held, region = held_of(every, wards), rows_of(Level.STUDY, every, "region")
    whole = merge(Level.STUDY, region, wards, held).matches
    listed = studies_of(wards)
    seen: list[Match] = []
    more = True
    while more:
        after = seen[-1].place if seen else None
        behind = [match for match in region if after is None or match.place < after][: limit + 1]
        rows = behind + [
            match for match in region if match not in behind and match.study["StudyInstanceUID"] in listed
        ]
        page = merge(Level.STUDY, rows, wards, held, limit=limit, after=after)
        seen, more = seen + page.matches, page.more
    assert [summary(match) for match in seen] == [summary(match) for match in whole]


def test_a_study_that_a_ward_and_the_region_date_differently_is_on_one_page() -> None:
    image = Image(1, 1, 1, False, frozenset({"a/ct"}), frozenset({"a/ct"}))
    (listed,) = rows_of(Level.STUDY, [image], "a/ct")
    held = Held(frozenset(), frozenset({image.series_uid}), frozenset({image.study_uid}))
    there = replace(listed, study={**listed.study, "StudyDate": "20200901"}, holdings=(), wards=("b/ct",))
    wards = [WardMatches("a/ct", (listed,))]
    between = StudyPlace("20200501", "", "1")
    assert len(merge(Level.STUDY, [there], wards, held).matches) == 1
    assert merge(Level.STUDY, [there], wards, held, after=between).matches == []


@settings(max_examples=100, deadline=None)
@given(images(20), st.sampled_from([Level.STUDY, Level.SERIES, Level.IMAGE]))
def test_a_listing_is_the_order_of_the_union(every: list[Image], level: Level) -> None:
    wards = answers(level, every)
    region = rows_of(level, every, "region")
    keyword = {Level.STUDY: "study", Level.SERIES: "series", Level.IMAGE: "instance"}[level]
    name = {Level.STUDY: "StudyInstanceUID", Level.SERIES: "SeriesInstanceUID"}.get(level, "SOPInstanceUID")
    whole = merge(level, region, wards, held_of(every, wards)).matches
    found = listing(level, [standing_of(match) for match in region], wards)
    assert found == [getattr(match, keyword)[name] for match in whole]


def test_an_instance_that_arrived_while_it_was_asked_counts_once() -> None:
    image = Image(1, 1, 1, True, frozenset({"a/ct"}), frozenset({"a/ct"}))
    wards = answers(Level.STUDY, [image])
    (match,) = merge(
        Level.STUDY, rows_of(Level.STUDY, [image], "region"), wards, held_of([image], wards)
    ).matches
    assert match.instance_count == 1
    assert match.series_count == 1


def test_a_study_at_two_wards_is_one_row_and_their_copies_count_once() -> None:
    both = frozenset({"a/ct", "b/ct"})
    every = [
        Image(1, 1, 1, False, both, both),
        Image(1, 2, 1, False, frozenset({"b/ct"}), frozenset({"b/ct"})),
    ]
    page = merge(Level.STUDY, [], answers(Level.STUDY, every), Held())
    (match,) = page.matches
    assert (match.instance_count, match.series_count, match.wards) == (2, 2, ("a/ct", "b/ct"))
    assert match.modalities == ("MR", "US")


def test_truncation_is_named_on_the_row() -> None:
    image = Image(1, 1, 1, False, frozenset({"a/ct"}), frozenset({"a/ct"}))
    (listed,) = rows_of(Level.STUDY, [image], "a/ct")
    cut = Match(**{**{name: getattr(listed, name) for name in listed.__slots__}, "truncated": True})
    (match,) = merge(Level.STUDY, [], [WardMatches("a/ct", (cut,), True)], Held()).matches
    assert match.truncated


def test_patients_of_two_hospitals_with_one_id_stay_two() -> None:
    def at(issuer: str, ward: str) -> WardMatches:
        listed = Match(
            Level.STUDY,
            issuer,
            {"PatientID": "123"},
            {"StudyInstanceUID": f"1.{issuer}"},
            holdings=(SeriesHolding("1.1", "CT", (f"1.{len(issuer)}.1",)),),
        )
        return WardMatches(ward, (listed,))

    page = merge(Level.PATIENT, [], [at("A", "a/ct"), at("BB", "b/ct")], Held())
    assert sorted(match.issuer for match in page.matches) == ["A", "BB"]
    assert [match.study_count for match in page.matches] == [1, 1]


def test_the_regions_patients_without_an_id_stay_apart() -> None:
    region = [Match(Level.PATIENT, "A", {"PatientName": name}, study_count=1) for name in ("X", "Y")]
    assert len(merge(Level.PATIENT, region, [], Held()).matches) == 2


def test_studies_without_a_patient_id_are_no_ones_together() -> None:
    listed = tuple(
        Match(
            Level.STUDY,
            "A",
            {},
            {"StudyInstanceUID": uid},
            holdings=(SeriesHolding(f"{uid}.1", "CT", (f"{uid}.1.1",)),),
        )
        for uid in ("1.1", "1.2")
    )
    assert len(merge(Level.PATIENT, [], [WardMatches("a/ct", listed)], Held()).matches) == 2
