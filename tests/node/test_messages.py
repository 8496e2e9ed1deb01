"""Command sets: judged by pydicom both ways, tolerant of odd senders, and by random input."""

from __future__ import annotations

from io import BytesIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset

from node.dimse import messages
from node.dimse.errors import Violation
from node.dimse.messages import Field

CT = "1.2.840.10008.5.1.4.1.1.2"


def by_peer(octets: bytes) -> Dataset:
    return read_dataset(BytesIO(octets), True, True)


def test_store_request_as_pydicom_reads_it() -> None:
    octets = messages.store_request(258, CT, "1.2.3", originator=("MOVER", 9))
    command = by_peer(octets)
    assert command.CommandGroupLength == len(octets) - 12
    assert (command.AffectedSOPClassUID, command.AffectedSOPInstanceUID) == (CT, "1.2.3")
    assert (command.CommandField, command.MessageID, command.Priority) == (1, 258, 0)
    assert command.CommandDataSetType != messages.NO_DATASET
    assert (command.MoveOriginatorApplicationEntityTitle, command.MoveOriginatorMessageID) == ("MOVER", 9)
    assert [int(element.tag) for element in command] == sorted(int(element.tag) for element in command)


def test_response_echoes_uids_as_they_came() -> None:
    request = messages.parse(messages.store_request(7, CT, "../../etc/x"))
    octets = messages.response(request, 0x0117, comment="no \\ UID\n" + "x" * 90)
    command = by_peer(octets)
    assert (command.CommandField, command.MessageIDBeingRespondedTo, command.Status) == (0x8001, 7, 0x0117)
    assert command.CommandDataSetType == messages.NO_DATASET
    assert bytes(request.elements[0x1000]) in octets
    assert command.ErrorComment.startswith("no ? UID?x") and len(command.ErrorComment) <= 64


def test_parse_what_pydicom_writes() -> None:
    command = Dataset()
    command.AffectedSOPClassUID = CT
    command.CommandField = 0x8020
    command.MessageIDBeingRespondedTo = 3
    command.CommandDataSetType = 1
    command.Status = 0xFF00
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = True, True
    write_dataset(buffer, command)
    parsed = messages.parse(buffer.getvalue())
    assert parsed.is_response and parsed.has_dataset and parsed.status == 0xFF00
    assert parsed.affected_sop_class_uid == CT


def test_odd_senders_pass() -> None:
    body = (messages.element(0x1000, b"1.2.3 ") + messages.short(0x0110, 5) + messages.short(0x0100, 1)
            + messages.element(0x0002, CT.encode() + b" ") + messages.element(0x5010, b"legacy"))
    parsed = messages.parse(body)  # no group length, out of order, space padding, no data set type
    assert (parsed.field, parsed.message_id, parsed.affected_sop_instance_uid) == (1, 5, "1.2.3")
    assert parsed.affected_sop_class_uid == CT
    assert not parsed.has_dataset


def test_explicit_vr_passes() -> None:
    command = Dataset()
    command.CommandGroupLength = 0
    command.CommandField = 0x0030
    command.MessageID = 4
    command.CommandDataSetType = 0x0101
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = False, True
    write_dataset(buffer, command)
    parsed = messages.parse(buffer.getvalue())
    assert (parsed.field, parsed.message_id, parsed.has_dataset) == (Field.C_ECHO, 4, False)


@pytest.mark.parametrize("octets", [b"", b"\0" * 7, messages.echo_request(1)[:-1],
                                    messages.element(0x0110, b"\1\0")])
def test_broken_command_sets_abort(octets: bytes) -> None:
    with pytest.raises(Violation):
        messages.parse(octets)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 80))
def test_random_octets_raise_nothing_else(octets: bytes, at: int) -> None:
    good = messages.store_request(1, CT, "1.2.3")
    for candidate in (octets, good[:at] + octets + good[at:]):
        try:
            parsed = messages.parse(candidate)
        except Violation:
            continue
        messages.response(parsed, 0)
        assert parsed.name and isinstance(parsed.affected_sop_instance_uid, str)
