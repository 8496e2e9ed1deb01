"""One answer out of many: the region's rows and what single wards still hold, joined. Pure: it asks nobody.

An instance lives in exactly one of two places as far as an answer goes. With a receipt it is the region's,
and the region's index counts it. Without one it is pending at a ward, and the ward names it. So an answer is
the region's rows plus what the wards list, and the only question is how to add the two without counting
twice or missing what moves in between:

The wards are asked first, the region after them. An instance that a ward lists and that is replicated before
the region is asked shows up in both, and is counted once, since wards give the UIDs of what they list
(`holdings`) and the region is asked which of them it has (`Held`). The other order would lose it: absent
from the region when that was asked, no longer pending when the ward was.

A ward that does not answer in time changes nothing in the rows; its coverage says what is missing. A ward
lists at most 1,000 UIDs; one that has more says so, and is incomplete. Nothing is left out in silence.

One row per study, whichever wards hold a part of it: counts are unions by SOP Instance UID and by Series
Instance UID, never sums. What a study is called (patient, date, description) is the region's word where it
has one, else the word of the first ward, by its id, so that the same state of affairs always gives the same
page.

Order is that of the index (`archive/model.py`, Query), so that a ward's row falls where the region's row of
the same study will fall after its replication, and pages do not jump.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from archive.index.rows import number_of
from archive.model import Level, Match, SeriesHolding, StudyPlace

PENDING_UIDS_MAX = 1_000
UID_AT = {Level.STUDY: 2, Level.SERIES: 1, Level.IMAGE: 1}  # in what orders a row (`archive.listed`)


@dataclass(frozen=True, slots=True)
class WardMatches:
    """What one ward answered: its own rows, with holdings."""

    ward: str
    matches: tuple[Match, ...]
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """Which of the wards' pending instances, and of their series and studies, the region has within the
    scope.
    """

    instances: frozenset[str] = frozenset()
    series: frozenset[str] = frozenset()
    studies: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a merged answer, and whether more rows follow it."""

    matches: list[Match]
    more: bool


def merge(
    level: Level,
    region: Sequence[Match],
    wards: Sequence[WardMatches],
    held: Held,
    *,
    limit: int | None = None,
    offset: int = 0,
    after: StudyPlace | None = None,
) -> Page:
    """The page of the union. `region` holds the region's first `offset + limit + 1` rows (behind `after`),
    and every row of its own that a ward lists too, wherever it stands. For the patient level wards answer
    with studies.

    What stands before `after` is left out at the end, by the place that the row has in the union: a ward and
    the region may know a study by different dates.
    """
    end = None if limit is None else offset + limit
    if not any(answer.matches for answer in wards):
        return Page(list(region[offset:end]), end is not None and len(region) > end)
    joins: Mapping[Level, Callable[[Match | None, Sequence[tuple[str, Match]], Held], Match | None]] = {
        Level.PATIENT: _join_patient,
        Level.STUDY: _join_study,
        Level.SERIES: _join_series,
        Level.IMAGE: _join_image,
    }
    rows = {_key(level, match) + _place(match, place): match for place, match in enumerate(region)}
    listed: dict[tuple[str, ...], list[tuple[str, Match]]] = {}
    for answer in sorted(wards, key=lambda answer: answer.ward):
        for match in answer.matches:
            listed.setdefault(_key(level, match), []).append((answer.ward, match))
    for key, matches in listed.items():
        joined = joins[level](rows.get(key), matches, held)
        if joined is None:
            continue  # it reached the region since the ward listed it, and is counted there
        rows[key] = joined
    ordered = [row for row in in_order(level, rows.values()) if after is None or row.place < after]
    return Page(ordered[offset:end], end is not None and len(ordered) > end)


def with_own(
    level: Level, region: Sequence[Match], own: Sequence[Match], *, limit: int | None = None
) -> list[Match]:
    """The region's answer joined with what the ward that asked finds in its own archive. The region counts
    what it has receipts for and what each ward listed as pending, this one too; so the two overlap, and no
    count is their sum. What a ward lists is bounded and its archive is not: a count is the larger of the two.
    Rows whose bytes are not all in the own archive are `nearline`.
    """
    rows = {_own_key(level, match): replace(match, nearline=True) for match in region}
    for match in own:
        key = _own_key(level, match)
        row = rows.get(key)
        rows[key] = match if row is None else _joined_with_own(row, match)
    return in_order(level, rows.values())[:limit]


def _own_key(level: Level, match: Match) -> tuple[str, ...]:
    """A patient without an ID is told from another by all that is known of them."""
    if level is Level.PATIENT and not match.patient.get("PatientID"):
        return (*_key(level, match), *(part for item in sorted(match.patient.items()) for part in item))
    return _key(level, match)


def _joined_with_own(row: Match, own: Match) -> Match:
    return replace(
        row,
        modalities=_union(row.modalities, own.modalities),
        sop_classes=_union(row.sop_classes, own.sop_classes),
        study_count=max(row.study_count, own.study_count),
        series_count=max(row.series_count, own.series_count),
        instance_count=max(row.instance_count, own.instance_count),
        wards=_union(row.wards, own.wards),
        nearline=own.nearline or row.instance_count > own.instance_count,
    )


def uids_of(wards: Iterable[WardMatches]) -> frozenset[str]:
    """Every SOP Instance UID that the wards list."""
    return frozenset(uid for holding in _holdings(wards) for uid in holding.sop_instance_uids)


def series_of(wards: Iterable[WardMatches]) -> frozenset[str]:
    """Every Series Instance UID that the wards list."""
    return frozenset(holding.series_uid for holding in _holdings(wards))


def studies_of(wards: Iterable[WardMatches]) -> frozenset[str]:
    """Every Study Instance UID that the wards list."""
    return frozenset(match.study["StudyInstanceUID"] for answer in wards for match in answer.matches)


def in_order(level: Level, matches: Iterable[Match]) -> list[Match]:
    """The index's order: studies by date, time and UID descending; below them by number, then UID."""
    if level is Level.STUDY:
        return sorted(matches, key=lambda match: match.place, reverse=True)
    orders: Mapping[Level, Callable[[Match], tuple[str | int, ...]]] = {
        Level.PATIENT: lambda match: (
            match.patient.get("PatientID", ""),
            match.issuer,
            match.study.get("StudyInstanceUID", ""),
        ),
        Level.SERIES: lambda match: (
            number_of(match.series.get("SeriesNumber", "")),
            match.series["SeriesInstanceUID"],
        ),
        Level.IMAGE: lambda match: (
            number_of(match.instance.get("InstanceNumber", "")),
            match.instance["SOPInstanceUID"],
        ),
    }
    return sorted(matches, key=orders[level])


def listing(
    level: Level, region: Sequence[tuple[str | int, ...]], wards: Sequence[WardMatches]
) -> list[str]:
    """The UIDs of the union in its order. `region` is what orders its rows, by `archive.listed`, read after
    the wards were asked; a row of both stands where the region has it."""
    place = UID_AT[level]
    known = {row[place] for row in region}
    new: dict[str, tuple[str | int, ...]] = {}
    for answer in sorted(wards, key=lambda answer: answer.ward):
        for match in answer.matches:
            standing = standing_of(match)
            if standing[place] not in known:
                new.setdefault(str(standing[place]), standing)
    rows = [*region, *new.values()]
    # Series and instances are ordered by number and UID alone.
    ordered = sorted(rows, key=lambda row: row[: place + 1], reverse=level is Level.STUDY)
    return list(dict.fromkeys(str(row[place]) for row in ordered))


def standing_of(match: Match) -> tuple[str | int, ...]:
    """What orders a row, as `archive.listed` gives it."""
    if match.level is Level.STUDY:
        return match.place.date, match.place.time, match.place.uid
    if match.level is Level.SERIES:
        return number_of(match.series.get("SeriesNumber", "")), match.series["SeriesInstanceUID"]
    return number_of(match.instance.get("InstanceNumber", "")), match.instance["SOPInstanceUID"]


def _key(level: Level, match: Match) -> tuple[str, ...]:
    if level is Level.PATIENT:
        patient_id = match.patient.get("PatientID", "")
        # Without an ID nobody is the same patient as anybody: such a patient is that of one study.
        return match.issuer, patient_id, "" if patient_id else match.study.get("StudyInstanceUID", "")
    if level is Level.STUDY:
        return (match.study["StudyInstanceUID"],)
    if level is Level.SERIES:
        return (match.series["SeriesInstanceUID"],)
    return (match.instance["SOPInstanceUID"],)


def _place(match: Match, place: int) -> tuple[str, ...]:
    """Keeps the region's patients without an ID apart."""
    return (str(place),) if match.level is Level.PATIENT and not match.patient.get("PatientID") else ()


def _studies_in(listed: Sequence[tuple[str, Match]]) -> frozenset[str]:
    return frozenset(match.study["StudyInstanceUID"] for _, match in listed)


def _holdings(wards: Iterable[WardMatches]) -> Iterable[SeriesHolding]:
    return (holding for answer in wards for match in answer.matches for holding in match.holdings)


def _fresh(listed: Sequence[tuple[str, Match]], held: Held) -> dict[str, tuple[SeriesHolding, set[str]]]:
    """By series, what the wards list and the region lacks; the same instance at two wards is one."""
    fresh: dict[str, tuple[SeriesHolding, set[str]]] = {}
    for _, match in listed:
        for holding in match.holdings:
            lacking = set(holding.sop_instance_uids) - held.instances
            if lacking:
                fresh.setdefault(holding.series_uid, (holding, set()))[1].update(lacking)
    return fresh


def _alone(listed: Sequence[tuple[str, Match]], held: Held) -> tuple[str, ...]:
    """The wards that list something which the region lacks."""
    return _union((), (ward for ward, match in listed if _fresh([(ward, match)], held)))


def _join_study(row: Match | None, listed: Sequence[tuple[str, Match]], held: Held) -> Match | None:
    fresh = _fresh(listed, held)
    base = row or listed[0][1]
    if row is None:
        if not fresh:
            return None
        base = replace(base, series_count=0, instance_count=0)
    new_series = [series for series in fresh if row is None or series not in held.series]
    return replace(
        base,
        modalities=_union(
            base.modalities, (holding.modality for holding, _ in fresh.values() if holding.modality)
        ),
        sop_classes=_union(base.sop_classes, (uid for _, match in listed for uid in match.sop_classes)),
        series_count=base.series_count + len(new_series),
        instance_count=base.instance_count + sum(len(uids) for _, uids in fresh.values()),
        wards=_union(base.wards, (ward for ward, _ in listed)),
        holdings=(),
        pending_at=_alone(listed, held),
        truncated=base.truncated or any(match.truncated for _, match in listed),
    )


def _join_series(row: Match | None, listed: Sequence[tuple[str, Match]], held: Held) -> Match | None:
    joined = _join_study(row, listed, held)
    return joined if joined is None else replace(joined, series_count=(row or listed[0][1]).series_count)


def _join_image(row: Match | None, listed: Sequence[tuple[str, Match]], held: Held) -> Match | None:
    base = row or listed[0][1]
    if row is None and base.instance["SOPInstanceUID"] in held.instances:
        return None
    wards = _union(base.wards, (ward for ward, _ in listed))
    return replace(base, wards=wards, holdings=(), pending_at=() if row else wards)


def _join_patient(row: Match | None, listed: Sequence[tuple[str, Match]], held: Held) -> Match | None:
    fresh = _fresh(listed, held)
    if row is None and not fresh:
        return None
    if row is None and not listed[0][1].patient.get("PatientID") and _studies_in(listed) & held.studies:
        return None  # the region's row of a patient without an ID can't be told from others: it stands alone
    nothing = Match(Level.PATIENT, listed[0][1].issuer, listed[0][1].patient)
    base = row or nothing
    new_studies = {
        match.study["StudyInstanceUID"]
        for _, match in listed
        if any(uid not in held.instances for holding in match.holdings for uid in holding.sop_instance_uids)
    }
    return replace(
        base,
        modalities=_union(
            base.modalities, (holding.modality for holding, _ in fresh.values() if holding.modality)
        ),
        study_count=base.study_count + len(new_studies - held.studies),
        series_count=base.series_count + len(fresh.keys() - held.series),
        instance_count=base.instance_count + sum(len(uids) for _, uids in fresh.values()),
        wards=_union(base.wards, (ward for ward, _ in listed)),
        holdings=(),
        pending_at=_alone(listed, held),
        truncated=base.truncated or any(match.truncated for _, match in listed),
    )


def _union(first: Iterable[str], second: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({*first, *second}))
