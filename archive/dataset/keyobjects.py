"""Reads key object selections that reject what they name (IHE RAD TF-3 4.66): the title, and the instances of
the evidence sequence (PS3.3 C.17.2.3). Reads one document; decides nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from pydicom import dcmread
from pydicom.dataset import Dataset

from archive.errors import CannotUnderstand
from archive.model import is_uid

KEY_OBJECTS = "1.2.840.10008.5.1.4.1.1.88.59"
DOCUMENT_BYTES_MAX = 64 << 20
REFERENCES_MAX = 100_000
_TITLE = "ConceptNameCodeSequence"
_EVIDENCE = "CurrentRequestedProcedureEvidenceSequence"


@dataclass(frozen=True, slots=True)
class Reference:
    """An instance that a document names."""

    study_uid: str
    sop_instance_uid: str


@dataclass(frozen=True, slots=True)
class KeyObjects:
    """A key object selection: the code and the scheme of its title, and what it is about, each once."""

    code: str
    scheme: str
    references: tuple[Reference, ...]


def read_key_objects(payload: BinaryIO) -> KeyObjects:
    """Of a whole Part 10 stream. Raises CannotUnderstand."""
    try:
        document = dcmread(payload)
        titles = document.get(_TITLE) or [Dataset()]
        references = dict.fromkeys(_references(document))
        return KeyObjects(
            str(titles[0].get("CodeValue", "")).strip(),
            str(titles[0].get("CodingSchemeDesignator", "")).strip(),
            tuple(references),
        )
    except CannotUnderstand:
        raise
    except Exception as error:  # whatever pydicom raises on what came from outside
        raise CannotUnderstand(
            f"a key object selection can't be read ({type(error).__name__})"
        ) from None


def _references(document: Any) -> Iterator[Reference]:
    count = 0
    for study in document.get(_EVIDENCE) or ():
        study_uid = str(study.get("StudyInstanceUID", ""))
        for series in study.get("ReferencedSeriesSequence") or ():
            for item in series.get("ReferencedSOPSequence") or ():
                uid = str(item.get("ReferencedSOPInstanceUID", ""))
                if not is_uid(uid) or not is_uid(study_uid):
                    raise CannotUnderstand("a key object selection names what is no UID")
                count += 1
                if count > REFERENCES_MAX:
                    raise CannotUnderstand(f"a key object selection names more than {REFERENCES_MAX}")
                yield Reference(study_uid, uid)
