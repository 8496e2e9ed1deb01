"""C-FIND identifiers as they come (PS3.4 C.4.1.1.3.1): what is asked, at which level, of what may be asked
there (C.6), and what of it is not supported. It matches nothing.

Where relational queries were not agreed on, a question names one entity of each level above its own by the
unique key, and asks nothing else of them (C.4.1.2.1). A Patient ID beside a Study Instance UID passes: many a
workstation sends it. So does the issuer of a Patient ID.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from archive.catalog import BY_KEYWORD, CATALOG, COMPUTED, SEQUENCES
from archive.dataset.charsets import TextDecoder, decoder
from archive.dataset.values import text_of
from archive.errors import InvalidQuery
from archive.model import Level, is_uid

VALUE_BYTES_MAX = 1 << 20  # a list of some 16,000 UIDs
KEYS_MAX = 512
CHARACTER_SET_BYTES_MAX = 256

ORDER = (Level.PATIENT, Level.STUDY, Level.SERIES, Level.IMAGE)


class Model(Enum):
    """The information models: the values are their levels, from the top (PS3.4 C.6.1 to C.6.3)."""

    PATIENT_ROOT = ORDER
    STUDY_ROOT = ORDER[1:]
    PATIENT_STUDY_ONLY = ORDER[:2]


class Kind(Enum):
    """How a key is supported (PS3.4 C.2.2.1). The values are the words of the conformance statement."""

    UNIQUE = "unique"
    REQUIRED = "required"
    OPTIONAL = "optional"
    RETURNED = "returned, not matched on"


UNIQUE: Mapping[Level, str] = {
    Level.PATIENT: "PatientID",
    Level.STUDY: "StudyInstanceUID",
    Level.SERIES: "SeriesInstanceUID",
    Level.IMAGE: "SOPInstanceUID",
}
REQUIRED: Mapping[Level, frozenset[str]] = {
    Level.PATIENT: frozenset({"PatientName"}),
    Level.STUDY: frozenset({"StudyDate", "StudyTime", "AccessionNumber", "StudyID"}),
    Level.SERIES: frozenset({"Modality", "SeriesNumber"}),
    Level.IMAGE: frozenset({"InstanceNumber"}),
}

# Told, and not matched on: counts, the availability, titles. The lists of a study are kept and matched.
RETURNED_ONLY = frozenset(COMPUTED) - {"ModalitiesInStudy", "SOPClassesInStudy"}
# Attributes of lower levels that are understood of a study, as one of its instances'.
OF_STUDY_TOO = frozenset({"Modality", "SOPClassUID"})
# What a request carries beside its keys (PS3.4 C.4.1.1.3.1).
_NOT_KEYS = frozenset({"QueryRetrieveLevel", "SpecificCharacterSet"})
_ZONE = "TimezoneOffsetFromUTC"  # of the keys, and never matched on
_ISSUER = "IssuerOfPatientID"  # says which patient of a Patient ID is meant, so it goes with that (C.6.1.1.2)
_NOT_RETURNED = frozenset({"RetrieveURL"})  # it is QIDO's


@dataclass(frozen=True, slots=True)
class Question:
    """What an identifier asks: `keys` have a value to match, `wanted` are to be returned (keywords or dotted
    paths), `unsupported` were asked for and are not matched on or not known. `character_set` and `timezone`
    (an offset from UTC, where there is one) are as they came."""

    level: Level
    keys: tuple[tuple[str, str], ...]
    wanted: tuple[str, ...]
    unsupported: tuple[str, ...]
    character_set: bytes = b""
    timezone: str = ""


def supported_keys(level: Level) -> dict[str, Kind]:
    """The keys of a level by keyword or dotted path; a study's are also its patient's where it is the top."""
    keys: dict[str, Kind] = {}
    for entry in CATALOG:
        if entry.level is level and entry.keyword != _ZONE:
            required = entry.keyword in REQUIRED[level]
            unique = entry.keyword == UNIQUE[level]
            keys[entry.keyword] = (
                Kind.UNIQUE if unique else Kind.REQUIRED if required else Kind.OPTIONAL
            )  # fmt: skip
    for keyword, own in COMPUTED.items():
        if own is level and keyword not in _NOT_RETURNED:
            keys[keyword] = Kind.RETURNED if keyword in RETURNED_ONLY else Kind.OPTIONAL
    return keys


def read_question(dataset: Dataset, model: Model, *, relational: bool = False) -> Question:
    """What an identifier asks. InvalidQuery when the level is none of the model's, when the hierarchy is not
    kept and relational queries were not agreed on, and for what is past the bounds."""
    if len(dataset) > KEYS_MAX:
        raise InvalidQuery(f"the identifier has more than {KEYS_MAX} elements")
    raw = dataset.get_item(0x00080005)
    character_set = _bytes_of(raw) if raw is not None else b""
    text = decoder(character_set)
    level = _level(dataset, text, model)
    keys: list[tuple[str, str]] = []
    wanted: list[str] = []
    unsupported: list[str] = []
    timezone = ""
    for keyword, value in _asked(dataset, text):
        if not _is_known(keyword, level):
            unsupported.append(keyword)
            continue
        wanted.append(keyword)
        if keyword == _ZONE:
            timezone = value
        if not value or keyword == _ZONE:
            continue
        if keyword in RETURNED_ONLY:
            unsupported.append(keyword)
        else:
            keys.append((keyword, value))
    if not relational:
        _require_hierarchy(level, dict(keys), model)
    return Question(level, tuple(keys), tuple(wanted), tuple(unsupported), character_set, timezone)


def _is_known(keyword: str, level: Level) -> bool:
    if keyword in _NOT_RETURNED:
        return False
    entry = BY_KEYWORD.get(keyword)
    own = entry.level if entry is not None else COMPUTED.get(keyword)
    if own is None:
        return False
    return ORDER.index(own) <= ORDER.index(level) or (level is Level.STUDY and keyword in OF_STUDY_TOO)


def _level(dataset: Dataset, text: TextDecoder, model: Model) -> Level:
    element = dataset.get_item(0x00080052)
    name = "" if element is None else _value(element, text)
    if name not in Level.__members__ or Level[name] not in model.value:
        raise InvalidQuery("Query/Retrieve Level missing or none of this model", "QueryRetrieveLevel")
    return Level[name]


def _require_hierarchy(level: Level, keys: Mapping[str, str], model: Model) -> None:
    above = model.value[: model.value.index(level)]
    for higher in above:
        value = keys.get(UNIQUE[higher], "")
        single = is_uid(value) if higher is not Level.PATIENT else not any(c in value for c in "*?\\")
        if not value or not single:
            raise InvalidQuery(f"a query at this level names one {UNIQUE[higher]}", UNIQUE[higher])
    if not above:
        return  # the top of Study Root holds the patient's keys too (C.6.2.1)
    names = {*UNIQUE.values(), _ISSUER}
    for keyword in keys:
        entry = BY_KEYWORD.get(keyword)
        own = entry.level if entry is not None else COMPUTED[keyword]
        if ORDER.index(own) < ORDER.index(level) and keyword not in names:
            raise InvalidQuery(f"{keyword} is no key of the {level.value} level", keyword)


def _asked(dataset: Dataset, text: TextDecoder) -> Iterator[tuple[str, str]]:
    """(keyword, dotted keyword or tag; value) of every key."""
    for tag in sorted(dataset.keys()):
        if tag.element == 0:
            continue
        keyword = keyword_for_tag(tag)
        if keyword in _NOT_KEYS:
            continue
        element = dataset.get_item(tag)
        if element.VR == "SQ" or keyword in SEQUENCES:
            yield from _asked_in_items(dataset, int(tag), keyword, text)
        elif not keyword or (keyword not in BY_KEYWORD and keyword not in COMPUTED):
            yield keyword or f"{int(tag):08X}", ""
        else:
            yield keyword, _value(element, text)


def _asked_in_items(dataset: Dataset, tag: int, keyword: str, text: TextDecoder) -> Iterator[tuple[str, str]]:
    known = SEQUENCES.get(keyword)
    if known is None:
        yield keyword or f"{tag:08X}", ""
        return
    try:
        items = dataset[tag].value if dataset[tag].VR == "SQ" else []
    except Exception as error:  # pydicom reads it only now, and fails in many ways
        raise InvalidQuery("a sequence key can't be read") from error
    if len(items) > 1:
        raise InvalidQuery("a sequence key has one item (PS3.4 C.2.2.2.6)", keyword)
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
            yield path, _value(element, text) if path in BY_KEYWORD else ""


def _value(element: DataElement | RawDataElement, text: TextDecoder) -> str:
    if isinstance(element, RawDataElement):
        value = element.value or b""
        if len(value) > VALUE_BYTES_MAX:
            raise InvalidQuery(f"a key is longer than {VALUE_BYTES_MAX} bytes")
        vr = _vr_of(keyword_for_tag(element.tag))
        own = (element.VR or "").encode("ascii", "replace")
        return text_of((own, not element.is_little_endian, value, text), vr, chars_max=VALUE_BYTES_MAX)
    if element.value is None:
        return ""
    values = element.value if isinstance(element.value, MultiValue | list) else [element.value]
    return "\\".join(str(value).strip(" \0") for value in values)


def _vr_of(keyword: str) -> str:
    tag = tag_for_keyword(keyword)
    return "UN" if tag is None else dictionary_VR(tag)


def _bytes_of(element: DataElement | RawDataElement) -> bytes:
    if isinstance(element, RawDataElement):
        return (element.value or b"")[:CHARACTER_SET_BYTES_MAX]
    values = element.value if isinstance(element.value, MultiValue | list) else [element.value or ""]
    return "\\".join(str(value) for value in values).encode("ascii", "replace")[:CHARACTER_SET_BYTES_MAX]
