"""Owns the data sets that go with commands (identifiers, PS3.4 C.4.1; action and event information, PS3.7
10.1), between the octets of an association and pydicom's form of them. Objects to be stored never come
here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TypeVar

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset

from archive.budget import ByteBudget
from archive.dataset.elements import WalkLimits, walk
from archive.dataset.encoding import encoding_of
from archive.dataset.sources import FileSource, Window
from archive.errors import CannotUnderstand, MissError, OutOfResources
from node.dimse.association import Association, Context
from node.dimse.contexts import EXPLICIT_BIG, IMPLICIT_LITTLE
from node.dimse.errors import Violation
from node.dimse.pdu import AbortSource

IDENTIFIER_BYTES_MAX = 1 << 20
HELD_BYTES_MAX = 64 << 20  # of what a service is receiving, of all devices together
COUNTED_FROM_BYTES = 16 << 10  # of each, so that ordinary ones are taken whatever others send

_LIMITS = WalkLimits(nesting_max=32, elements_max=100_000)

T = TypeVar("T")


def room() -> ByteBudget:
    """For what one service is receiving."""
    return ByteBudget(HELD_BYTES_MAX)


@contextmanager
def received(association: Association, context: Context, bytes_max: int, held: ByteBudget) -> Iterator[bytes]:
    """The data set of the command just received, of `bytes_max` at the most, within memory that all of them
    share: thousands that send a megabyte each, slowly, must not fill it. Raises OutOfResources."""
    octets = bytearray()
    taken = 0
    try:
        for view in association.fragments(context):
            if len(octets) + len(view) > bytes_max:  # the association ends, as AS8 has it
                raise Violation("an identifier is larger than its bound", 0, AbortSource.SERVICE_USER)
            octets += view
            more = max(len(octets) - COUNTED_FROM_BYTES - taken, 0)
            if not held.take(more):
                raise OutOfResources("too many large requests are being received: try later")
            taken += more
        yield bytes(octets)
    finally:
        octets.clear()  # before it is given back: who handles the error still holds this frame
        held.give_back(taken)


def read_identifier(octets: bytes, transfer_syntax_uid: str) -> Dataset:
    """Decode an identifier. CannotUnderstand for one that ends inside an element, of which pydicom would take
    what there is and ask for that, and for whatever pydicom finds wrong."""
    careful(lambda: _require_whole(octets, transfer_syntax_uid))
    implicit, little = transfer_syntax_uid == IMPLICIT_LITTLE, transfer_syntax_uid != EXPLICIT_BIG
    return careful(lambda: read_dataset(BytesIO(octets), implicit, little))


def _require_whole(octets: bytes, transfer_syntax_uid: str) -> None:
    window = Window(FileSource(BytesIO(octets), 0))
    for _ in walk(window, encoding_of(transfer_syntax_uid, octets[:8]), _LIMITS, strict=True):
        pass


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
