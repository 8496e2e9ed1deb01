"""Matches of each level, for what is made of them."""

from __future__ import annotations

from archive.model import Level, Match

STUDY = Match(
    level=Level.STUDY,
    issuer="SANMARTINO",
    patient={
        "PatientName": "Müller^Jürgen=山田",
        "PatientID": "123",
        "PatientBirthDate": "19700101",
    },
    study={
        "StudyInstanceUID": "1.2.3",
        "StudyDate": "20260102",
        "StudyDescription": "Thorax",
        "PatientWeight": "80.5",
        "PatientSize": "tall",
    },
    modalities=("CT", "SR"),
    sop_classes=("1.2.840.10008.5.1.4.1.1.2",),
    series_count=2,
    instance_count=7,
)
SERIES = Match(
    level=Level.SERIES,
    issuer="SANMARTINO",
    patient={"PatientID": "123", "IssuerOfPatientID": "OTHER"},
    study={"StudyInstanceUID": "1.2.3"},
    series={
        "SeriesInstanceUID": "1.2.4",
        "Modality": "CT",
        "SeriesNumber": "3",
        "RequestAttributesSequence.ScheduledProcedureStepID": "A\\B\\",
        "RequestAttributesSequence.RequestedProcedureID": "\\\\R",
    },
    modalities=("CT",),
    instance_count=5,
)
IMAGE = Match(
    level=Level.IMAGE,
    issuer="",
    patient={},
    study={"StudyInstanceUID": "1.2.3"},
    series={"SeriesInstanceUID": "1.2.4"},
    instance={
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "SOPInstanceUID": "1.2.5",
        "InstanceNumber": "abc",
        "Rows": "512",
        "ImageType": "ORIGINAL\\PRIMARY",
    },
)
