"""Owns the data sets that go with commands (identifiers, PS3.4 C.4.1; action and event information, PS3.7
10.1), between the octets of an association and pydicom's form of them. Objects to be stored never come
here."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import TypeVar

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset

from archive.errors import CannotUnderstand, MissError
from node.dimse.contexts import EXPLICIT_BIG, IMPLICIT_LITTLE

IDENTIFIER_BYTES_MAX = 1 << 20

T = TypeVar("T")


def read_identifier(octets: bytes, transfer_syntax_uid: str) -> Dataset:
    """Decode an identifier; whatever pydicom finds wrong with it is CannotUnderstand."""
    implicit, little = transfer_syntax_uid == IMPLICIT_LITTLE, transfer_syntax_uid != EXPLICIT_BIG
    return careful(lambda: read_dataset(BytesIO(octets), implicit, little))


def write_identifier(identifier: Dataset, transfer_syntax_uid: str) -> bytes:
    """Encode an identifier."""
    buffer = DicomBytesIO()
    buffer.is_implicit_VR = transfer_syntax_uid == IMPLICIT_LITTLE
    buffer.is_little_endian = transfer_syntax_uid != EXPLICIT_BIG
    write_dataset(buffer, identifier)
    return buffer.getvalue()


def careful(read: Callable[[], T]) -> T:
    """Hostile values surface as any kind of exception, and late: pydicom decodes them when they are looked
    at."""
    try:
        return read()
    except MissError:
        raise
    except Exception as error:
        raise CannotUnderstand(f"the identifier can't be read ({type(error).__name__})") from None
