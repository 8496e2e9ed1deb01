"""The one table of indexed attributes. Everything that names them derives from it: what the header scanner
reads, the columns of the index, what C-FIND and QIDO-RS may match on and must return (PS3.4 Tables C.6-1 to
5, PS3.18 Tables 10.6.1-5 and 10.6.3-3 to 5, and the optional keys that users meet).

A keyword is unique in the table. A dotted keyword is a path into a sequence: the values of all its items are
kept, joined by a backslash, since sequence matching succeeds when any item matches (PS3.4 C.2.2.2.6).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from pydicom.datadict import dictionary_VM, dictionary_VR, tag_for_keyword

from archive.model import Level


@dataclass(frozen=True, slots=True)
class Indexed:
    """One indexed attribute: `qido` says that QIDO-RS returns it without being asked (PS3.18 10.6.3.3)."""

    keyword: str
    level: Level
    qido: bool = False

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(self.keyword.split("."))

    @property
    def tags(self) -> tuple[int, ...]:
        """The tags from the data set's root to the attribute."""
        return tuple(_tag(keyword) for keyword in self.path)

    @property
    def vr(self) -> str:
        return dictionary_VR(self.tags[-1])

    @property
    def multiple(self) -> bool:
        """Whether several values may be kept: the dictionary allows them, or it lies in a sequence."""
        return len(self.path) > 1 or dictionary_VM(self.tags[-1]) != "1"

    @property
    def column(self) -> str:
        """The column's name in the index: the keyword in snake case."""
        return _snake(self.keyword)


@cache
def _tag(keyword: str) -> int:
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise LookupError(keyword)
    return tag


@cache
def _snake(keyword: str) -> str:
    out = ""
    for i, char in enumerate(keyword):
        boundary = char.isupper() and i and (not keyword[i - 1].isupper() or keyword[i + 1 : i + 2].islower())
        out += ("_" if boundary and not out.endswith("_") else "") + char.lower()
    return out.replace(".", "_")


CATALOG: tuple[Indexed, ...] = (
    Indexed("PatientName", Level.PATIENT, qido=True),
    Indexed("PatientID", Level.PATIENT, qido=True),
    Indexed("IssuerOfPatientID", Level.PATIENT),
    Indexed("PatientBirthDate", Level.PATIENT, qido=True),
    Indexed("PatientSex", Level.PATIENT, qido=True),
    Indexed("PatientBirthTime", Level.PATIENT),
    Indexed("OtherPatientIDs", Level.PATIENT),
    Indexed("PatientComments", Level.PATIENT),
    Indexed("StudyInstanceUID", Level.STUDY, qido=True),
    Indexed("StudyDate", Level.STUDY, qido=True),
    Indexed("StudyTime", Level.STUDY, qido=True),
    Indexed("AccessionNumber", Level.STUDY, qido=True),
    Indexed("StudyID", Level.STUDY, qido=True),
    Indexed("StudyDescription", Level.STUDY),
    Indexed("ReferringPhysicianName", Level.STUDY, qido=True),
    Indexed("NameOfPhysiciansReadingStudy", Level.STUDY),
    Indexed("AdmittingDiagnosesDescription", Level.STUDY),
    Indexed("PatientAge", Level.STUDY),
    Indexed("PatientSize", Level.STUDY),
    Indexed("PatientWeight", Level.STUDY),
    Indexed("TimezoneOffsetFromUTC", Level.STUDY, qido=True),
    Indexed("SeriesInstanceUID", Level.SERIES, qido=True),
    Indexed("Modality", Level.SERIES, qido=True),
    Indexed("SeriesNumber", Level.SERIES, qido=True),
    Indexed("SeriesDescription", Level.SERIES, qido=True),
    Indexed("SeriesDate", Level.SERIES),
    Indexed("SeriesTime", Level.SERIES),
    Indexed("BodyPartExamined", Level.SERIES),
    Indexed("Laterality", Level.SERIES),
    Indexed("ProtocolName", Level.SERIES),
    Indexed("PerformingPhysicianName", Level.SERIES),
    Indexed("OperatorsName", Level.SERIES),
    Indexed("InstitutionName", Level.SERIES),
    Indexed("InstitutionalDepartmentName", Level.SERIES),
    Indexed("StationName", Level.SERIES),
    Indexed("Manufacturer", Level.SERIES),
    Indexed("ManufacturerModelName", Level.SERIES),
    Indexed("FrameOfReferenceUID", Level.SERIES),
    Indexed("PerformedProcedureStepStartDate", Level.SERIES, qido=True),
    Indexed("PerformedProcedureStepStartTime", Level.SERIES, qido=True),
    Indexed("RequestAttributesSequence.ScheduledProcedureStepID", Level.SERIES, qido=True),
    Indexed("RequestAttributesSequence.RequestedProcedureID", Level.SERIES, qido=True),
    Indexed("SOPClassUID", Level.IMAGE, qido=True),
    Indexed("SOPInstanceUID", Level.IMAGE, qido=True),
    Indexed("InstanceNumber", Level.IMAGE, qido=True),
    Indexed("Rows", Level.IMAGE, qido=True),
    Indexed("Columns", Level.IMAGE, qido=True),
    Indexed("BitsAllocated", Level.IMAGE, qido=True),
    Indexed("NumberOfFrames", Level.IMAGE, qido=True),
    Indexed("ImageType", Level.IMAGE),
    Indexed("AcquisitionNumber", Level.IMAGE),
    Indexed("ContentDate", Level.IMAGE),
    Indexed("ContentTime", Level.IMAGE),
    Indexed("AcquisitionDate", Level.IMAGE),
    Indexed("AcquisitionTime", Level.IMAGE),
    Indexed("ConceptNameCodeSequence.CodeValue", Level.IMAGE),
    Indexed("ConceptNameCodeSequence.CodeMeaning", Level.IMAGE),
    Indexed("CompletionFlag", Level.IMAGE),
    Indexed("VerificationFlag", Level.IMAGE),
)

# Answered from the rows themselves, in no data set: counts and lists kept in the transaction that adds an
# instance, and where the instance can be had.
COMPUTED: dict[str, Level] = {
    "NumberOfPatientRelatedStudies": Level.PATIENT,
    "NumberOfPatientRelatedSeries": Level.PATIENT,
    "NumberOfPatientRelatedInstances": Level.PATIENT,
    "ModalitiesInStudy": Level.STUDY,
    "SOPClassesInStudy": Level.STUDY,
    "NumberOfStudyRelatedSeries": Level.STUDY,
    "NumberOfStudyRelatedInstances": Level.STUDY,
    "NumberOfSeriesRelatedInstances": Level.SERIES,
    "InstanceAvailability": Level.STUDY,
    "RetrieveAETitle": Level.STUDY,
    "RetrieveURL": Level.STUDY,
}

BY_KEYWORD: dict[str, Indexed] = {entry.keyword: entry for entry in CATALOG}

# What is kept of each sequence's items, by the sequence's keyword.
SEQUENCES: dict[str, tuple[str, ...]] = {
    entry.path[0]: tuple(other.keyword for other in CATALOG if other.path[0] == entry.path[0])
    for entry in CATALOG
    if len(entry.path) > 1
}


@cache
def at_level(level: Level) -> tuple[Indexed, ...]:
    """The indexed attributes of one level, in the table's order."""
    return tuple(entry for entry in CATALOG if entry.level is level)
