"""The study search page, without HTTP: criteria from a URL, the query they mean, and an answer as rows and
words that a template prints. It shows nothing that the source did not answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime, tzinfo
from urllib.parse import urlencode

from archive.model import Fields, Level, Match, Query, StudyPlace, is_uid
from federation.coverage import CoverageState, WardCoverage, apart, plain_words
from federation.source import Answer

PAGE_ROWS = 50
TEXT_CHARS_MAX = 64
MODALITIES = ("CT", "MR", "CR", "DX", "US", "MG", "NM", "PT", "XA", "RF", "ES", "OP", "SC", "SR", "OT")


@dataclass(frozen=True, slots=True)
class Search:
    """The criteria as the person wrote them; the URL carries them."""

    name: str = ""
    patient_id: str = ""
    date_from: str = ""
    date_to: str = ""
    modality: str = ""
    accession: str = ""
    description: str = ""
    after: StudyPlace | None = None

    def query(self) -> Query:
        keys = {
            "PatientName": contains(self.name.replace("^", " ")),
            "PatientID": contains(self.patient_id),
            "StudyDate": _range(self.date_from, self.date_to),
            "ModalitiesInStudy": self.modality,
            "AccessionNumber": contains(self.accession),
            "StudyDescription": contains(self.description),
        }
        return Query(
            Level.STUDY,
            tuple((keyword, value) for keyword, value in keys.items() if value),
            combine_datetime=True,
            limit=PAGE_ROWS,
            after=self.after,
        )

    def criteria(self) -> dict[str, str]:
        found = {name: str(value) for name, value in asdict(replace(self, after=None)).items() if value}
        return found | ({"after": _written(self.after)} if self.after else {})

    def url(self) -> str:
        names = {"patient_id": "id", "date_from": "from", "date_to": "to"}
        parameters = {names.get(name, name): value for name, value in self.criteria().items()}
        return f"/studies?{urlencode(parameters)}" if parameters else "/studies"


def read_search(parameters: Mapping[str, str]) -> Search:
    """The criteria in a URL. What can't be one (a date that is none) is left out, never an error: people edit
    addresses."""

    def text(name: str) -> str:
        return "".join(c for c in parameters.get(name, "").strip()[:TEXT_CHARS_MAX] if c.isprintable())

    modality = text("modality").upper()
    return Search(
        name=text("name"),
        patient_id=text("id"),
        date_from=_iso(text("from")),
        date_to=_iso(text("to")),
        modality=modality if modality.replace("_", "").isalnum() and len(modality) <= 16 else "",
        accession=text("accession"),
        description=text("description"),
        after=_place(parameters.get("after", "")),
    )


def _written(place: StudyPlace) -> str:
    """A place in a URL: what follows the last row of a page."""
    return f"{place.date}_{place.time}_{place.uid}"


def _place(text: str) -> StudyPlace | None:
    day, _, rest = text.partition("_")
    time, _, uid = rest.partition("_")
    plain = all(len(part) <= TEXT_CHARS_MAX and part.isprintable() for part in (day, time))
    return StudyPlace(day, time, uid) if plain and uid and is_uid(uid) else None


def contains(text: str) -> str:
    """A wildcard key that finds `text` anywhere, word after word; `*` and `?` stay what they are. A backslash
    would separate values (PS3.5 6.4): any character stands in for it."""
    words = text.replace("\\", "?").split()
    return f"*{'*'.join(words)}*" if words else ""


def _iso(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        return ""


def _range(date_from: str, date_to: str) -> str:
    start, end = date_from.replace("-", ""), date_to.replace("-", "")
    return f"{start}-{end}" if start or end else ""


@dataclass(frozen=True, slots=True)
class WardLine:
    """What an answer covers of one ward: the words, and how they are coloured."""

    words: str
    tone: str


@dataclass(frozen=True, slots=True)
class Row:
    """One study of the page."""

    patient_name: str
    patient_id: str
    issuer: str
    born: str
    sex: str
    date: str
    time: str
    modalities: tuple[str, ...]
    description: str
    accession: str
    copies: tuple[str, ...]
    waiting: str
    series_count: int
    instance_count: int
    href: str

    @property
    def label(self) -> str:
        return f"{self.description} of {self.patient_name}, {self.date}"


@dataclass(frozen=True, slots=True)
class Listing:
    """A page of results. `whole` is false when the answer is known to lack something."""

    rows: tuple[Row, ...]
    covered: tuple[WardLine, ...]
    missing: tuple[WardLine, ...]
    caption: str
    newest: str
    next: str

    @property
    def whole(self) -> bool:
        return not self.missing

    @property
    def wards(self) -> tuple[WardLine, ...]:
        return self.covered + self.missing


def listing(answer: Answer, search: Search, now_us: int, zone: tzinfo) -> Listing:
    wards = {ward.ward: ward for ward in answer.coverage}
    matches, more = answer.matches, answer.more
    whole = answer.covered and not any(apart(ward) for ward in answer.coverage)
    return Listing(
        rows=tuple(_row(match, wards) for match in matches),
        covered=tuple(ward_line(ward, now_us, zone) for ward in answer.coverage if ward.covered),
        missing=tuple(ward_line(ward, now_us, zone) for ward in answer.coverage if not ward.covered),
        caption=_caption(len(matches), search, more, whole=whole),
        newest=replace(search, after=None).url() if search.after else "",
        next=replace(search, after=matches[-1].place).url() if more and matches else "",
    )


def ward_line(ward: WardCoverage, now_us: int, zone: tzinfo, *, named: bool = True) -> WardLine:
    """The ward's part of an answer; without its name where a table gives it already."""
    tones = {CoverageState.ANSWERED: "good", CoverageState.UP_TO_DATE: "good", CoverageState.AS_OF: "aware"}
    words = plain_words(ward, now_us, zone)
    return WardLine(words if named else words.removeprefix(ward.title).strip(), tones.get(ward.state, "bad"))


def _caption(shown: int, search: Search, more: bool, *, whole: bool) -> str:
    """What is not complete is never called none."""
    if not shown and not whole:
        return "None found where this answer looked."
    if not shown:
        return "No further studies." if search.after else "No studies."
    studies = f"{shown} stud{'y' if shown == 1 else 'ies'}"
    if search.after:
        return f"{studies} further, newest first."
    return f"The newest {studies}." if more else f"{studies}, newest first."


def _row(match: Match, wards: Mapping[str, WardCoverage]) -> Row:
    patient, study = match.patient, match.study
    titles = tuple(wards[ward].title if ward in wards else ward for ward in match.wards)
    return Row(
        patient_name=person_name(patient.get("PatientName", "")) or "(no name)",
        patient_id=patient.get("PatientID", "") or "(no ID)",
        issuer=(patient.get("IssuerOfPatientID", "") or match.issuer) if patient.get("PatientID") else "",
        born=dicom_date(patient.get("PatientBirthDate", "")),
        sex=patient.get("PatientSex", ""),
        date=dicom_date(study.get("StudyDate", "")) or "(no date)",
        time=dicom_time(study.get("StudyTime", "")),
        modalities=match.modalities,
        description=study.get("StudyDescription", "") or "(no description)",
        accession=study.get("AccessionNumber", ""),
        copies=titles,
        waiting=_waiting(match, wards),
        series_count=match.series_count,
        instance_count=match.instance_count,
        href=viewer_link(study),
    )


def _waiting(match: Match, wards: Mapping[str, WardCoverage]) -> str:
    """Who still holds a part of the study alone; empty when all of it is in the region."""
    titles = [wards[ward].title if ward in wards else ward for ward in match.pending_at]
    return f"{', '.join(titles)} has not delivered all of it yet; it opens all the same" if titles else ""


def viewer_link(study: Fields) -> str:
    return f"/viewer/viewer?{urlencode({'StudyInstanceUIDs': study['StudyInstanceUID']})}"


def person_name(value: str) -> str:
    """A PN as people write it (PS3.5 6.2.1.1): `Rossi^Maria^^Dr` is `Rossi, Maria, Dr`; further groups
    (ideographic, phonetic) in brackets."""
    groups = [", ".join(part for part in group.split("^") if part.strip()) for group in value.split("=")]
    first, *others = [group for group in groups if group] or [""]
    return first + "".join(f" ({other})" for other in others)


def dicom_date(value: str) -> str:
    """A DA as ISO 8601; what is none stays as it is."""
    try:
        return datetime.strptime(value, "%Y%m%d").date().isoformat()
    except ValueError:
        return value


def dicom_time(value: str) -> str:
    digits = value.replace(":", "")
    return f"{digits[:2]}:{digits[2:4]}" if len(digits) >= 4 and digits[:4].isdigit() else value
