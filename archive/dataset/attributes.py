"""What a match knows of each attribute, and QIDO-RS results made of it (PS3.18 10.6.3.3, Annex F); C-FIND's
are `answers.py`. It decides what an answer shows; what may be asked and seen is decided elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Literal

from pydicom.datadict import dictionary_VR, tag_for_keyword

from archive.catalog import BY_KEYWORD, CATALOG, COMPUTED, SEQUENCES
from archive.dataset.charsets import UTF_8
from archive.dataset.jsonvalues import json_element
from archive.model import Level, Match

_ORDER = (Level.PATIENT, Level.STUDY, Level.SERIES, Level.IMAGE)

# PS3.18 Tables 10.6.3-3 to 5: these are left out when nothing is known of them; the others are there, empty.
_IF_KNOWN = {
    "TimezoneOffsetFromUTC",
    "SeriesDescription",
    "PerformedProcedureStepStartDate",
    "PerformedProcedureStepStartTime",
    "RequestAttributesSequence.ScheduledProcedureStepID",
    "RequestAttributesSequence.RequestedProcedureID",
    "Rows",
    "Columns",
    "BitsAllocated",
    "NumberOfFrames",
    "IssuerOfPatientID",
    "InstanceAvailability",
}
# The issuer is not in the tables; it goes along because a Patient ID means nothing without it.
_ALWAYS: dict[Level, tuple[str, ...]] = {
    level: tuple(
        entry.keyword
        for entry in CATALOG
        if (entry.qido or entry.keyword == "IssuerOfPatientID") and entry.level is level
    )
    for level in _ORDER
}
_ALWAYS_COMPUTED: dict[Level, tuple[str, ...]] = {
    Level.PATIENT: (),
    Level.STUDY: (
        "ModalitiesInStudy",
        "NumberOfStudyRelatedSeries",
        "NumberOfStudyRelatedInstances",
        "InstanceAvailability",
    ),
    Level.SERIES: ("NumberOfSeriesRelatedInstances",),
    Level.IMAGE: ("InstanceAvailability",),
}


def to_json(
    match: Match,
    includefield: Collection[str] | Literal["all"],
    *,
    level: Level,
    retrieve_url: Callable[[Match], str],
    levels: Sequence[Level] | None = None,
) -> dict[str, Any]:
    """A QIDO-RS result. `levels` are those whose attributes the resource returns by itself, `level` alone
    if not given; patient attributes go with the study's. `includefield` adds to them; what lies below
    `level` it does not."""
    shown: dict[str, bool] = {}  # keyword: whether it is there without a value too
    for shown_level in levels or (level,):
        of_level = _ALWAYS[Level.PATIENT] if shown_level is Level.STUDY else ()
        for keyword in (*of_level, *_ALWAYS[shown_level], *_ALWAYS_COMPUTED[shown_level]):
            shown[keyword] = keyword not in _IF_KNOWN and (keyword not in COMPUTED or shown_level is level)
    if includefield == "all":
        wanted: Iterable[str] = (*BY_KEYWORD, *COMPUTED)
    else:
        wanted = _expanded(includefield)
    for keyword in wanted:
        if _level_of(keyword) is not None and not _is_below(keyword, level):
            shown.setdefault(keyword, False)
    shown.pop("RetrieveURL", None)
    shown.pop("RetrieveAETitle", None)
    texts = [(keyword, value_of(match, keyword)) for keyword in shown]
    result: dict[str, Any] = {}
    for keyword, text in texts:
        if text or shown[keyword]:
            _put_json(result, keyword, text)
    url = retrieve_url(match)
    if url:
        result["00081190"] = {"vr": "UR", "Value": [url]}
    if any(not text.isascii() for _, text in texts):
        result["00080005"] = {"vr": "CS", "Value": [UTF_8]}
    return dict(sorted(result.items()))


def _put_json(result: dict[str, Any], keyword: str, text: str) -> None:
    sequence, _, leaf = keyword.rpartition(".")
    tag, vr = _tag_and_vr(leaf)
    if not sequence:
        result[f"{tag:08X}"] = json_element(vr, text)
        return
    parts = text.split("\\") if text else []
    element = result.setdefault(f"{_tag_and_vr(sequence)[0]:08X}", {"vr": "SQ"})
    items = element.setdefault("Value", []) if parts else element.get("Value", [])
    items.extend({} for _ in range(len(parts) - len(items)))
    for item, part in zip(items, parts, strict=False):
        if part:
            item[f"{tag:08X}"] = json_element(vr, part)


def value_of(match: Match, keyword: str) -> str:
    """What `match` knows of an attribute, in DICOM's string form; "" when nothing."""
    if keyword in COMPUTED:
        return _computed(match, keyword)
    entry = BY_KEYWORD[keyword]
    if entry.level is Level.PATIENT:
        value = match.patient.get(keyword, "")
        return value or match.issuer if keyword == "IssuerOfPatientID" else value
    if entry.level is Level.STUDY:
        return match.study.get(keyword, "")
    return (match.series if entry.level is Level.SERIES else match.instance).get(keyword, "")


def _computed(match: Match, keyword: str) -> str:
    """Counts are the match's own level's: a study's for a study, a series' for a series."""
    if keyword == "ModalitiesInStudy":
        return "\\".join(match.modalities)
    if keyword == "SOPClassesInStudy":
        return "\\".join(match.sop_classes)
    if keyword == "InstanceAvailability":
        return "NEARLINE" if match.nearline else "ONLINE"  # PS3.3 C.4.23.1.1
    counts: dict[Level, dict[str, int]] = {
        Level.PATIENT: {
            "NumberOfPatientRelatedStudies": match.study_count,
            "NumberOfPatientRelatedSeries": match.series_count,
            "NumberOfPatientRelatedInstances": match.instance_count,
        },
        Level.STUDY: {
            "NumberOfStudyRelatedSeries": match.series_count,
            "NumberOfStudyRelatedInstances": match.instance_count,
        },
        Level.SERIES: {"NumberOfSeriesRelatedInstances": match.instance_count},
    }
    count = counts.get(match.level, {}).get(keyword)
    return "" if count is None else str(count)


def _expanded(keywords: Iterable[str]) -> Iterator[str]:
    """A sequence's keyword stands for what is kept of its items."""
    for keyword in keywords:
        yield from SEQUENCES.get(keyword, (keyword,))


def _level_of(keyword: str) -> Level | None:
    entry = BY_KEYWORD.get(keyword)
    return entry.level if entry is not None else COMPUTED.get(keyword)


def _is_below(keyword: str, level: Level) -> bool:
    known = _level_of(keyword)
    return known is not None and _ORDER.index(known) > _ORDER.index(level)


def _tag_and_vr(keyword: str) -> tuple[int, str]:
    found = _TAGS.get(keyword)
    if found is None:
        raise LookupError(keyword)
    return found


def _tags() -> dict[str, tuple[int, str]]:
    names = {part for entry in CATALOG for part in entry.path}
    names |= {*COMPUTED}
    tags = {name: tag_for_keyword(name) for name in names}
    return {name: (tag, dictionary_VR(tag)) for name, tag in tags.items() if tag is not None}


_TAGS = _tags()
