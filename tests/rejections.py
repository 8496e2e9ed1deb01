"""Rejection notes as a modality or a workstation makes them (IHE RAD TF-3 4.66), by pydicom."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pydicom.dataset import Dataset

from tests.datasets import Instance, instance_of

KEY_OBJECTS = "1.2.840.10008.5.1.4.1.1.88.59"
_numbers = itertools.count(1)


def code(value: str, scheme: str = "DCM", meaning: str = "a title") -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def note_about(
    rejected: Sequence[Instance], title: str, *, scheme: str = "DCM", uid: str | None = None
) -> Instance:
    """A key object selection with this title about these instances."""
    document = Dataset()
    document.SOPClassUID = KEY_OBJECTS
    document.SOPInstanceUID = uid or f"1.2.826.7.{next(_numbers)}"
    document.StudyDate, document.StudyTime, document.PatientName = "20260102", "1030", "Rossi^Maria"
    document.PatientID, document.PatientBirthDate, document.PatientSex = "123", "19700101", "F"
    document.Modality, document.Manufacturer = "KO", "MISS"
    document.StudyInstanceUID = rejected[0].study_uid
    document.SeriesInstanceUID = document.SOPInstanceUID + ".9"
    document.SeriesNumber, document.InstanceNumber = "9", "1"
    document.ContentDate, document.ContentTime = "20260102", "1100"
    document.ValueType, document.ContinuityOfContent = "CONTAINER", "SEPARATE"
    document.ConceptNameCodeSequence = [code(title, scheme)]
    document.CurrentRequestedProcedureEvidenceSequence = []
    for study_uid in dict.fromkeys(one.study_uid for one in rejected):
        study = Dataset()
        study.StudyInstanceUID = study_uid
        study.ReferencedSeriesSequence = []
        of_study = [one for one in rejected if one.study_uid == study_uid]
        for series_uid in dict.fromkeys(one.series_uid for one in of_study):
            series = Dataset()
            series.SeriesInstanceUID = series_uid
            series.ReferencedSOPSequence = []
            for one in of_study:
                if one.series_uid == series_uid:
                    item = Dataset()
                    item.ReferencedSOPClassUID = one.sop_class_uid
                    item.ReferencedSOPInstanceUID = one.sop_instance_uid
                    series.ReferencedSOPSequence.append(item)
            study.ReferencedSeriesSequence.append(series)
        document.CurrentRequestedProcedureEvidenceSequence.append(study)
    return instance_of(document)
