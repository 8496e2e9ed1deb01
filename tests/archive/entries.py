"""Index entries by the thousand, without data sets: what the index sees of instances."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

from sqlalchemy import Connection, text

from archive.index.index import Index
from archive.index.schema import DERIVED, STUDY_TEXT, position
from archive.model import (
    Attributes,
    IndexEntry,
    InstanceHead,
    Location,
    Position,
    Provenance,
    Record,
    RecordKind,
)

CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
EXPLICIT = "1.2.840.10008.1.2.1"

_FAMILIES = (
    "Rossi",
    "Smith",
    "Müller",
    "Bianchi",
    "Goldsmith",
    "Nguyen",
    "O'Brien",
    "Di Marco",
    "Şahin",
    "Weiß",
)
_GIVEN = ("Maria", "John", "Anna", "Luca", "Zoë", "Pietro", "Giulia", "Håkon")
_DESCRIPTIONS = ("CT Thorax", "MR Brain 3T", "US Abdomen", "CT Brain w/o contrast", "100% rest_stress", "")


def entry(
    uid: str,
    *,
    content: str = "",
    study: str = "1.2.3",
    series: str = "1.2.3.1",
    kind: RecordKind = RecordKind.INSTANCE,
    ward: str = "a/one",
    issuer: str = "A",
    sop_class: str = CT,
    at_us: int = 1_000,
    sequence: int = 1,
    patient_fields: dict[str, str] | None = None,
    study_fields: dict[str, str] | None = None,
    series_fields: dict[str, str] | None = None,
    instance_fields: dict[str, str] | None = None,
) -> IndexEntry:
    """One record of an instance; `content` tells two contents of one UID apart."""
    head = InstanceHead(uid, uid, EXPLICIT, Provenance(ward, issuer, "CT1", "CT1", at_us))
    head = InstanceHead(sop_class, uid, EXPLICIT, head.provenance)
    digest = hashlib.sha256(f"{uid}/{content}".encode()).digest()
    offset = sequence * 4096
    record = Record(
        kind, sequence, head, digest, Location("p1", offset, 1000, 400), Position(1, offset + 4096)
    )
    attributes = Attributes(
        patient={"PatientName": "Rossi^Maria", "PatientID": "123"}
        if patient_fields is None
        else patient_fields,
        study={"StudyInstanceUID": study, **(study_fields or {"StudyDate": "20260102", "StudyTime": "1030"})},
        series={"SeriesInstanceUID": series, **(series_fields or {"Modality": "CT", "SeriesNumber": "1"})},
        instance={
            "SOPClassUID": sop_class,
            "SOPInstanceUID": uid,
            **(instance_fields or {"InstanceNumber": "1"}),
        },
    )
    return IndexEntry(record, attributes)


def many(studies: int, *, series: int = 1, instances: int = 1, seed: int = 1) -> Iterator[IndexEntry]:
    """Studies with names, dates and descriptions as archives have them; the same for the same seed."""
    chance = random.Random(seed)
    sequence = 0
    for number in range(studies):
        study = f"1.2.826.0.1.3680043.{seed}.{number}"
        person = chance.randrange(max(1, studies // 2))
        family, given = _FAMILIES[person % len(_FAMILIES)], _GIVEN[person % len(_GIVEN)]
        modality, sop_class = (("CT", CT), ("MR", MR))[chance.randrange(2)]
        date = f"20{chance.randrange(10, 27)}{chance.randrange(1, 13):02}{chance.randrange(1, 29):02}"
        time = f"{chance.randrange(24):02}{chance.randrange(60):02}{chance.randrange(60):02}"
        for serial in range(1, series + 1):
            for image in range(1, instances + 1):
                sequence += 1
                yield entry(
                    f"{study}.{serial}.{image}", study=study, series=f"{study}.{serial}",
                    sop_class=sop_class, at_us=sequence, sequence=sequence,
                    patient_fields={
                        "PatientName": f"{family}{person}^{given}", "PatientID": f"P{person:06}",
                        "PatientBirthDate": f"19{person % 90 + 10}0102", "PatientSex": "FM"[person % 2],
                    },
                    study_fields={
                        "StudyDate": date, "StudyTime": time, "AccessionNumber": f"ACC{number:07}",
                        "StudyDescription": _DESCRIPTIONS[chance.randrange(len(_DESCRIPTIONS))],
                        "ReferringPhysicianName": f"House^{given}", "StudyID": str(number),
                    },
                    series_fields={
                        "Modality": modality, "SeriesNumber": str(serial), "BodyPartExamined": "CHEST",
                        "SeriesDescription": "axial", "Manufacturer": "MISS",
                    },
                    instance_fields={
                        "InstanceNumber": str(image), "Rows": "512", "Columns": "512", "BitsAllocated": "16",
                        "ImageType": "ORIGINAL\\PRIMARY\\AXIAL", "ContentDate": date, "ContentTime": time,
                    },
                )  # fmt: skip


def batches(entries: Iterator[IndexEntry], size: int) -> Iterator[list[IndexEntry]]:
    batch: list[IndexEntry] = []
    for item in entries:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def empty(index: Index) -> None:
    """Take everything out of an index: an example of a property needs an empty one, a new one takes
    longer."""

    def work(connection: Connection) -> None:
        for table in (*DERIVED, position):
            connection.execute(table.delete())
        if connection.dialect.name == "sqlite":
            connection.execute(text(f"DELETE FROM {STUDY_TEXT}"))

    index._database.write(work)
