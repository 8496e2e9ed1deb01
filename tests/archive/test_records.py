"""The bytes of a record: what is written decodes to itself, and no changed bit passes for a record."""

from __future__ import annotations

import hashlib
import io
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread

from archive.errors import SchemaTooNew, TooLarge
from archive.model import InstanceHead, Position, Provenance, RecordKind
from archive.packs.records import (
    ALIGNMENT,
    FILE_HEADER_BYTES,
    TRAILER_BYTES,
    FileHeader,
    Flag,
    Framing,
    Purpose,
    Reference,
    part10_prefix,
)
from tests.datasets import make_instance


def file_header(number: int = 7) -> FileHeader:
    return FileHeader.new(
        Purpose.PACK, number, writer=b"w" * 16, previous=Position(6, 64_000), first_sequence=41, created_us=5
    )


WORDS = st.text(st.characters(codec="utf-8"), max_size=40)
HEADS = st.builds(
    InstanceHead,
    st.just("1.2.840.10008.5.1.4.1.1.2"),
    st.integers(0, 10**40).map(lambda number: f"1.2.{number}"),
    st.sampled_from(["1.2.840.10008.1.2", "1.2.840.10008.1.2.4.90"]),
    st.builds(Provenance, WORDS, WORDS, WORDS, WORDS, st.integers(0, 1 << 60)),
)


def encode(
    framing: Framing, head: InstanceHead, data: bytes, offset: int = 64 * 200
) -> tuple[bytes, bytes, bytes]:
    prefix = part10_prefix(head)
    header, trailer = framing.encode(
        RecordKind.CONFLICT, head, hashlib.sha256(data).digest(), flags=0, sequence=99, offset=offset,
        durable_to=Position(7, 8192), payload_bytes=len(prefix) + len(data), prefix=prefix,
    )  # fmt: skip
    return header, prefix, trailer


@given(HEADS, st.binary(max_size=200))
def test_a_record_decodes_to_what_was_encoded(head: InstanceHead, data: bytes) -> None:
    framing = Framing(file_header())
    header, prefix, trailer = encode(framing, head, data)
    decoded = framing.decode(header, 0, 64 * 200)
    assert decoded is not None
    assert (decoded.head, decoded.kind, decoded.sequence) == (head, RecordKind.CONFLICT, 99)
    assert decoded.durable_to == Position(7, 8192)
    assert decoded.payload_bytes == len(prefix) + len(data)
    assert decoded.prefix_bytes == len(prefix)
    whole = header + prefix + data + trailer
    assert len(whole) % ALIGNMENT == 0
    assert decoded.end == 64 * 200 + len(whole)
    digest = framing.decode_trailer(trailer[:TRAILER_BYTES], header, prefix, decoded.payload_bytes)
    assert digest == hashlib.sha256(data).digest()


@settings(max_examples=300)
@given(st.integers(0, 1 << 30), st.integers(0, 7))
def test_no_flipped_bit_goes_unseen(place: int, bit: int) -> None:
    framing = Framing(file_header())
    head = make_instance().head()
    header, prefix, trailer = encode(framing, head, b"data")
    covered = bytearray(header + prefix + trailer[:TRAILER_BYTES])
    covered[place % len(covered)] ^= 1 << bit
    header_after = bytes(covered[: len(header)])
    prefix_after = bytes(covered[len(header) : len(header) + len(prefix)])
    trailer_after = bytes(covered[len(header) + len(prefix) :])
    decoded = framing.decode(header_after, 0, 64 * 200)
    if decoded is not None:
        payload = decoded.payload_bytes
        assert framing.decode_trailer(trailer_after, header_after, prefix_after, payload) is None


def test_a_record_is_none_in_another_file_at_another_place_or_under_another_salt() -> None:
    header = file_header()
    framing = Framing(header)
    encoded, _, _ = encode(framing, make_instance().head(), b"x")
    assert framing.decode(encoded, 0, 64 * 200) is not None
    assert framing.decode(encoded, 0, 64 * 201) is None
    assert Framing(file_header()).decode(encoded, 0, 64 * 200) is None
    assert Framing(file_header(8)).decode(encoded, 0, 64 * 200) is None


def test_a_file_header_survives_the_loss_of_either_page() -> None:
    header = file_header()
    data = header.encode()
    assert len(data) == FILE_HEADER_BYTES
    half = FILE_HEADER_BYTES // 2
    assert FileHeader.decode(data) == header
    assert FileHeader.decode(bytes(half) + data[half:]) == header
    assert FileHeader.decode(data[:half] + bytes(half)) == header
    assert FileHeader.decode(bytes(FILE_HEADER_BYTES)) is None
    assert FileHeader.decode(b"") is None
    assert FileHeader.decode(random.Random(1).randbytes(FILE_HEADER_BYTES)) is None


def test_a_file_of_a_newer_release_is_refused_and_not_taken_for_damage() -> None:
    data = bytearray(file_header().encode())
    data[8] = 2
    for start in (0, FILE_HEADER_BYTES // 2):
        body = bytes(data[start : start + 88])
        body = body[:8] + b"\x02" + body[9:]
        data[start : start + 104] = body + hashlib.blake2b(body, digest_size=16).digest()
    with pytest.raises(SchemaTooNew):
        FileHeader.decode(bytes(data))


def test_a_reference_decodes_to_itself() -> None:
    reference = Reference("large/00ff.pack", 8400, 1 << 33, 340)
    assert Reference.decode(reference.encode()) == reference


def test_a_word_that_does_not_fit_is_refused() -> None:
    head = InstanceHead("1.2", "1.2.3", "1.2", Provenance("w" * 300, "", "", "", 0))
    with pytest.raises(TooLarge):
        encode(Framing(file_header()), head, b"")


def test_a_streamed_record_has_its_length_in_the_trailer() -> None:
    framing = Framing(file_header())
    head = make_instance().head()
    prefix = part10_prefix(head)
    header = framing.encode_streamed_header(head, kind=RecordKind.INSTANCE, sequence=3, prefix=prefix)
    decoded = framing.decode(header, 0, FILE_HEADER_BYTES)
    assert decoded is not None
    assert decoded.flags == Flag.STREAMED
    digest = hashlib.sha256(b"abc").digest()
    payload = len(prefix) + 3
    trailer = framing.encode_streamed_trailer(header, prefix, payload_bytes=payload, digest=digest)
    assert framing.decode_trailer(trailer, header, prefix, payload) == digest


@pytest.mark.parametrize("calling_ae", ["CT1", "", "A" * 16, "A" * 17, "back\\slash", "ünicode"])
def test_the_prefix_is_a_part_10_header_that_pydicom_reads(calling_ae: str) -> None:
    instance = make_instance(sop_uid="1.2.345")
    head = instance.head(Provenance("h/w", "ISSUER", "CT1", calling_ae, 1))
    prefix = part10_prefix(head)
    assert prefix == part10_prefix(head)
    dataset = dcmread(io.BytesIO(prefix + instance.dataset))
    meta = dataset.file_meta
    assert str(meta.MediaStorageSOPInstanceUID) == "1.2.345"
    assert str(meta.MediaStorageSOPClassUID) == instance.sop_class_uid
    assert str(meta.TransferSyntaxUID) == instance.transfer_syntax_uid
    assert meta.FileMetaInformationGroupLength == len(prefix) - 144
    assert prefix[:128] == bytes(128)
    fits = calling_ae in ("CT1", "A" * 16)
    assert meta.get("SourceApplicationEntityTitle", "") == (calling_ae if fits else "")
