"""The one place where the domain's `Fields` and `Match` meet DICOM's forms of them: C-FIND identifiers
(PS3.4 C.4.1) and QIDO-RS results (PS3.18 10.6.3.3, Annex F). It decides what an answer shows; what may be
asked and seen is decided elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Literal

from pydicom import config
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from archive.catalog import BY_KEYWORD, CATALOG, COMPUTED
from archive.dataset.charsets import UTF_8, TextDecoder, decoder
from archive.dataset.jsonvalues import json_element, number_of
from archive.dataset.values import DEFAULT_CHARSET_VRS, text_of
from archive.errors import InvalidQuery
from archive.model import Level, Match, is_uid

QUERY_VALUE_BYTES_MAX = 1 << 20  # a list of some 16,000 UIDs
QUERY_KEYS_MAX = 512

_ORDER = (Level.PATIENT, Level.STUDY, Level.SERIES, Level.IMAGE)
_UNIQUE = {Level.PATIENT: "PatientID", Level.STUDY: "StudyInstanceUID", Level.SERIES: "SeriesInstanceUID"}

_WILDCARDS = frozenset("*?\\")

# What a request carries beside its keys (PS3.4 C.4.1.1.3.1).
_NOT_KEYS = frozenset({"QueryRetrieveLevel", "SpecificCharacterSet", "TimezoneOffsetFromUTC"})
_RETURNED_ONLY = frozenset(COMPUTED) - {"ModalitiesInStudy", "SOPClassesInStudy"}

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


def to_dataset(match: Match, keywords: Iterable[str], *, level: Level, retrieve_ae: str = "") -> Dataset:
    """A C-FIND response's identifier: the keywords asked for, without value where nothing is known, and what
    PS3.4 C.4.1.1.3.2 adds to them."""
    dataset = Dataset()
    _put(dataset, "QueryRetrieveLevel", level.value)
    ascii_only = True
    for keyword in _expanded(keywords):
        known = _level_of(keyword)
        if known is None or keyword == "RetrieveURL":
            continue
        text = "" if _is_below(keyword, level) else value_of(match, keyword)
        ascii_only = ascii_only and text.isascii()
        _put(dataset, keyword, text)
    if retrieve_ae:
        _put(dataset, "RetrieveAETitle", retrieve_ae)
    if not ascii_only:
        _put(dataset, "SpecificCharacterSet", UTF_8)
    return dataset


def _put(dataset: Dataset, keyword: str, text: str) -> None:
    sequence, _, leaf = keyword.rpartition(".")
    if not sequence:
        _add(dataset, leaf, text)
        return
    tag, _ = _tag_and_vr(sequence)
    parts = text.split("\\") if text else []
    if tag not in dataset:
        dataset.add(DataElement(tag, "SQ", []))
    items = dataset[tag].value
    while len(items) < len(parts):
        items.append(Dataset())
    for item, part in zip(items, parts, strict=False):
        _add(item, leaf, part)


def _add(dataset: Dataset, keyword: str, text: str) -> None:
    tag, vr = _tag_and_vr(keyword)
    if vr in DEFAULT_CHARSET_VRS:
        text = text.encode("latin-1", "replace").decode("latin-1")  # what can be written of such a value
    value: object = text
    if vr in ("IS", "DS", "US", "UL", "SS", "SL"):
        numbers = [number_of(vr, part) for part in text.split("\\")] if text else []
        # What is no number can't be sent as one: such a value is left empty rather than failing the answer.
        value = "" if None in numbers else (text if vr in ("IS", "DS") else numbers)
    elif vr not in ("LT", "ST", "UT"):
        value = text.split("\\") if "\\" in text else text
    # The values were stored as they came: bad ones are answered too, and must not warn.
    try:
        dataset.add(DataElement(tag, vr, value, validation_mode=config.IGNORE))
    except (ValueError, OverflowError, ArithmeticError):
        dataset.add(DataElement(tag, vr, ""))


def query_from_dataset(
    dataset: Dataset, *, relational: bool = False, patient_root: bool = False
) -> tuple[Level, tuple[tuple[str, str], ...], list[str], list[str]]:
    """Level, keys (those with a value), requested keywords and unsupported ones of a C-FIND request.

    Raises InvalidQuery when the level is none of the model's, or when a unique key of a higher level is not
    a single value and relational queries were not negotiated (PS3.4 C.4.1.2.1).
    """
    if len(dataset) > QUERY_KEYS_MAX:
        raise InvalidQuery(f"the identifier has more than {QUERY_KEYS_MAX} elements")
    raw_charset = dataset.get_item(0x00080005)
    text = decoder(_bytes_of(raw_charset) if raw_charset is not None else b"")
    level = _query_level(dataset, text, patient_root)
    keys: list[tuple[str, str]] = []
    requested: list[str] = []
    unsupported: list[str] = []
    for keyword, value in _asked(dataset, text):
        known = _level_of(keyword)
        if known is None or _is_below(keyword, level):
            unsupported.append(keyword)
            continue
        requested.append(keyword)
        if value and keyword not in _RETURNED_ONLY:
            keys.append((keyword, value))
    if not relational:
        _require_hierarchy(level, dict(keys), patient_root)
    return level, tuple(keys), requested, unsupported


def _query_level(dataset: Dataset, text: TextDecoder, patient_root: bool) -> Level:
    element = dataset.get_item(0x00080052)
    name = "" if element is None else _query_value(element, text)
    if name not in Level.__members__ or (name == "PATIENT" and not patient_root):
        raise InvalidQuery("the Query/Retrieve Level is missing or is none of this model's")
    return Level[name]


def _require_hierarchy(level: Level, keys: dict[str, str], patient_root: bool) -> None:
    for higher in _ORDER[: _ORDER.index(level)]:
        if higher is Level.PATIENT and not patient_root:
            continue
        value = keys.get(_UNIQUE[higher], "")
        single = is_uid(value) if higher is not Level.PATIENT else _WILDCARDS.isdisjoint(value)
        if not value or not single:
            raise InvalidQuery(f"a query at this level names one {_UNIQUE[higher]} (PS3.4 C.4.1.2.1)")


def _asked(dataset: Dataset, text: TextDecoder) -> Iterator[tuple[str, str]]:
    """(keyword, dotted keyword or tag; value) of every key."""
    for tag in sorted(dataset.keys()):
        if tag.element == 0:
            continue
        keyword = keyword_for_tag(tag)
        if keyword in _NOT_KEYS:
            continue
        element = dataset.get_item(tag)
        if element.VR == "SQ" or keyword in _SEQUENCES:
            yield from _asked_in_items(dataset, int(tag), keyword, text)
        elif not keyword or keyword not in BY_KEYWORD and keyword not in COMPUTED:
            yield keyword or f"{int(tag):08X}", ""
        else:
            yield keyword, _query_value(element, text)


def _asked_in_items(dataset: Dataset, tag: int, keyword: str, text: TextDecoder) -> Iterator[tuple[str, str]]:
    known = _SEQUENCES.get(keyword)
    if known is None:
        yield keyword or f"{tag:08X}", ""
        return
    try:
        items = dataset[tag].value if dataset[tag].VR == "SQ" else []
    except Exception as error:  # pydicom reads it only now, and fails in many ways
        raise InvalidQuery("a sequence key can't be read") from error
    if len(items) > 1:
        raise InvalidQuery("a sequence key has more than one item (PS3.4 C.2.2.2.6)")
    asked = 0
    for item in items or ():
        for path, value in _asked_leaves(item, keyword, text):
            asked += 1
            yield path, value
    if not asked:
        for path in known:
            yield path, ""


def _asked_leaves(item: Dataset, sequence: str, text: TextDecoder) -> Iterator[tuple[str, str]]:
    for tag in sorted(item.keys()):
        element = item.get_item(tag)
        path = f"{sequence}.{keyword_for_tag(tag) or f'{int(tag):08X}'}"
        if element is not None:
            yield path, _query_value(element, text) if path in BY_KEYWORD else ""


_SEQUENCES: dict[str, list[str]] = {}
for _entry in CATALOG:
    if len(_entry.path) > 1:
        _SEQUENCES.setdefault(_entry.path[0], []).append(_entry.keyword)


def _query_value(element: DataElement | RawDataElement, text: TextDecoder) -> str:
    if isinstance(element, RawDataElement):
        value = element.value or b""
        if len(value) > QUERY_VALUE_BYTES_MAX:
            raise InvalidQuery(f"a key is longer than {QUERY_VALUE_BYTES_MAX} bytes")
        vr = _tag_and_vr(keyword_for_tag(element.tag))[1]
        own = (element.VR or "").encode("ascii", "replace")
        return text_of((own, not element.is_little_endian, value, text), vr, chars_max=QUERY_VALUE_BYTES_MAX)
    if element.value is None:
        return ""
    values = element.value if isinstance(element.value, MultiValue | list) else [element.value]
    return "\\".join(str(value).strip(" \0") for value in values)


def _bytes_of(element: DataElement | RawDataElement) -> bytes:
    if isinstance(element, RawDataElement):
        return (element.value or b"")[:256]
    values = element.value if isinstance(element.value, MultiValue | list) else [element.value or ""]
    return "\\".join(str(value) for value in values).encode("ascii", "replace")[:256]


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
        return "ONLINE"
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
        yield from _SEQUENCES.get(keyword, (keyword,))


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
    names |= {*COMPUTED, "QueryRetrieveLevel", "SpecificCharacterSet"}
    tags = {name: tag_for_keyword(name) for name in names}
    return {name: (tag, dictionary_VR(tag)) for name, tag in tags.items() if tag is not None}


_TAGS = _tags()
