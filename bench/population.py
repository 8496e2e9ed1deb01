"""A region's patients to search: studies of ten small instances, with names, dates and descriptions as
unevenly spread as real ones, the same on any machine. Made from numbers; it stands for nobody."""

from __future__ import annotations

import datetime
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from miss.load.instances import ROOT, Instance

KIND = 8                     # in the UIDs; those of `miss/load/instances.py` are below
INSTANCES_EACH_STUDY = 10
INSTANCES_EACH_SERIES = 5
PATIENTS_EACH_STUDY = 0.6
FIRST_DAY = datetime.date(2016, 1, 1)
DAYS = 3652
FAMILIES = 4_000
PIXELS: Final = memoryview(bytes(range(256)) * 4)  # 32 x 32, of 8 bits: what is searched is not the pixels

_GIVEN = ("ADA", "AGNESE", "ALDO", "ALESSIO", "ALICE", "ANDREA", "ANNA", "BEATRICE", "BRUNO", "CARLO",
          "CHIARA", "CLARA", "DARIO", "DIEGO", "ELENA", "ELISA", "EMMA", "ENRICO", "FABIO",
          "FRANCESCA", "GAIA", "GINO", "GIORGIO", "GIULIA", "GIUSEPPE", "IDA", "IRENE", "IVANO",
          "LAURA", "LEA", "LUCA", "LUISA", "MARCO", "MARIA", "MARTA", "MATTEO", "MILENA", "NADIA",
          "NICOLA", "OLGA", "PAOLO", "PIA", "PIETRO", "RITA", "ROBERTA", "SARA", "SERGIO",
          "SILVIA", "SIMONE", "STEFANO", "TERESA", "TOMMASO", "UGO", "VALERIA", "VERA", "VITTORIO")
_ONSETS = ("B", "BR", "C", "CH", "D", "F", "FR", "G", "GR", "L", "M", "N", "P", "PR", "R", "S", "SC", "ST",
           "T", "TR", "V", "Z")
_VOWELS = "AEIO"
_CODAS = ("", "", "", "L", "N", "R", "S")
_ENDINGS = ("ELLI", "ETTI", "INI", "ONE", "ARI", "OSI", "ACCI", "ANO", "UCCI", "ERO", "ATO", "ESE")
_MODALITIES = ("CT", "CT", "CT", "MR", "MR", "CR", "CR", "CR", "CR", "US", "US", "MG")
_REGIONS = ("TESTA", "TORACE", "ADDOME", "BACINO", "GINOCCHIO DX", "GINOCCHIO SX", "SPALLA",
            "RACHIDE LOMBARE", "RACHIDE CERVICALE", "MAMMELLA", "COLLO", "MANO", "PIEDE",
            "ADDOME SUPERIORE", "TORACE E ADDOME")
_ADDITIONS = ("", "", "", " CON MDC", " SENZA MDC", " CONTROLLO", " URGENTE")


@dataclass(frozen=True, slots=True)
class Study:
    """What is searched by, as DICOM writes it."""

    uid: str
    patient_id: str
    patient_name: str
    birth_date: str
    sex: str
    date: str
    time: str
    accession_number: str
    modality: str
    description: str
    referring: str


class Population:
    """All instances of `studies` studies, by number: ten make a study of two series."""

    sop_class_uid = str(SecondaryCaptureImageStorage)
    transfer_syntax_uid = str(ExplicitVRLittleEndian)

    def __init__(self, studies: int) -> None:
        self.name = f"{studies:,} studies"
        self.count = studies * INSTANCES_EACH_STUDY
        self.studies: Sequence[Study] = _studies(studies)

    def instance(self, number: int) -> Instance:
        """Number 0 and on."""
        place, at = divmod(number, INSTANCES_EACH_STUDY)
        study = self.studies[place]
        series = at // INSTANCES_EACH_SERIES + 1
        series_uid = f"{study.uid}.{series}"
        sop_instance_uid = f"{series_uid}.{at + 1}"
        head = b"".join(element(keyword, value) for keyword, value in (
            ("SpecificCharacterSet", "ISO_IR 192"), ("ImageType", "ORIGINAL\\PRIMARY"),
            ("SOPClassUID", self.sop_class_uid), ("SOPInstanceUID", sop_instance_uid),
            ("StudyDate", study.date), ("SeriesDate", study.date),
            ("StudyTime", study.time), ("SeriesTime", study.time),
            ("AccessionNumber", study.accession_number), ("Modality", study.modality),
            ("ConversionType", "DI"), ("InstitutionName", "Ospedale di prova"),
            ("ReferringPhysicianName", study.referring), ("StudyDescription", study.description),
            ("SeriesDescription", f"{study.description} {series}"),
            ("PatientName", study.patient_name), ("PatientID", study.patient_id),
            ("PatientBirthDate", study.birth_date), ("PatientSex", study.sex),
            ("StudyInstanceUID", study.uid), ("SeriesInstanceUID", series_uid),
            ("StudyID", str(place % 10_000)), ("SeriesNumber", str(series)),
            ("InstanceNumber", str(at % INSTANCES_EACH_SERIES + 1)),
        )) + _image()
        return Instance(self.sop_class_uid, sop_instance_uid, study.uid, self.transfer_syntax_uid, head,
                        (PIXELS,), len(head) + len(PIXELS))


def element(keyword: str, value: str) -> bytes:
    """One element in Explicit VR Little Endian, with a length of two octets (PS3.5 7.1.2)."""
    head, pad = _tag_and_vr(keyword)
    octets = value.encode()
    if len(octets) & 1:
        octets += pad
    return head + len(octets).to_bytes(2, "little") + octets


@functools.cache
def _tag_and_vr(keyword: str) -> tuple[bytes, bytes]:
    tag = tag_for_keyword(keyword)
    assert tag is not None
    vr = dictionary_VR(tag)
    return ((tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little") + vr.encode(),
            b"\0" if vr == "UI" else b" ")


@functools.cache
def _image() -> bytes:
    """The elements that describe the pixels, up to the header of Pixel Data."""
    def short(element_number: int, value: int) -> bytes:
        return (b"\x28\0" + element_number.to_bytes(2, "little") + b"US\2\0" + value.to_bytes(2, "little"))

    return (short(0x0002, 1) + element("PhotometricInterpretation", "MONOCHROME2") + short(0x0010, 32)
            + short(0x0011, 32) + short(0x0100, 8) + short(0x0101, 8) + short(0x0102, 7) + short(0x0103, 0)
            + b"\xe0\x7f\x10\0OB\0\0" + len(PIXELS).to_bytes(4, "little"))


def _studies(count: int) -> list[Study]:
    chance = random.Random(count)
    families = _families(chance)
    people = max(1, int(count * PATIENTS_EACH_STUDY))
    patients = [_patient(number, families, chance) for number in range(people)]
    doctors = [f"{chance.choice(families)}^{chance.choice(_GIVEN)}" for _ in range(60)]
    return [_study(number, patients, doctors, chance) for number in range(count)]


def _study(number: int, patients: Sequence[tuple[str, str, str, str]], doctors: Sequence[str],
           chance: random.Random) -> Study:
    patient_id, name, born, sex = patients[int(len(patients) * chance.random() ** 1.3)]  # some come often
    day = _working_day(chance)
    modality = chance.choice(_MODALITIES)
    seconds = min(max(int(chance.gauss(12 * 3600, 3 * 3600)), 0), 86_399)
    return Study(
        f"{ROOT}.{KIND}.1{number:09d}", patient_id, name, born, sex, day.strftime("%Y%m%d"),
        f"{seconds // 3600:02d}{seconds // 60 % 60:02d}{seconds % 60:02d}", f"A{day.year}{number:07d}",
        modality, f"{modality} {chance.choice(_REGIONS)}{chance.choice(_ADDITIONS)}", chance.choice(doctors))


def _patient(number: int, families: Sequence[str], chance: random.Random) -> tuple[str, str, str, str]:
    born = datetime.date(1930, 1, 1) + datetime.timedelta(chance.randrange(90 * 365))
    family = families[int(len(families) ** chance.random()) - 1]  # a few are frequent
    name = f"{family}^{chance.choice(_GIVEN)}"
    return f"P{number * 7919 % 10_000_019:08d}", name, born.strftime("%Y%m%d"), chance.choice("FM")


def _working_day(chance: random.Random) -> datetime.date:
    """One in five of weekend days counts."""
    while True:
        day = FIRST_DAY + datetime.timedelta(chance.randrange(DAYS))
        if day.weekday() < 5 or chance.random() < 0.2:
            return day


def _families(chance: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < FAMILIES:
        syllables = (chance.choice(_ONSETS) + chance.choice(_VOWELS) + chance.choice(_CODAS)
                     for _ in range(chance.choice((1, 1, 2))))
        found["".join(syllables) + chance.choice(_ENDINGS)] = None
    return list(found)
