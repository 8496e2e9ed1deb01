"""A client that finds and retrieves at PDU level: answers are counted as they come, and never decoded, so
that a latency is the server's."""

from __future__ import annotations

from collections.abc import Iterator

from archive.errors import Unavailable
from bench.population import element
from bench.questions import Question
from miss.load.sender import CONTEXT_ID, Line, Target
from node.dimse import contexts, messages
from node.dimse.messages import Command, Field
from node.dimse.pdu import (
    COMMAND_FRAGMENT,
    LAST_FRAGMENT,
    PDV_HEADER_BYTES,
    PduType,
    ProposedContext,
    data_header,
)
from node.dimse.status import PENDING, PENDING_UNSUPPORTED_KEYS, SUCCESS

# What a workstation's list of studies shows.
_WANTED = ("StudyDate", "StudyTime", "AccessionNumber", "QueryRetrieveLevel", "ModalitiesInStudy",
           "StudyDescription", "PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID",
           "NumberOfStudyRelatedInstances")


class Asker:
    """One association for one SOP class of query or retrieve, kept open."""

    def __init__(self, target: Target, sop_class_uid: str = contexts.STUDY_ROOT_FIND) -> None:
        self._sop_class_uid = sop_class_uid
        self._line = Line(target, [ProposedContext(CONTEXT_ID, sop_class_uid, (contexts.EXPLICIT_LITTLE,))])
        self._message_id = 0

    def find(self, identifier: bytes) -> int:
        """C-FIND; how many matches came. Unavailable when it did not end with 0000."""
        count, final = self._ask(Field.C_FIND, identifier)
        if final.status != SUCCESS:
            raise Unavailable(f"a C-FIND was answered {final.status:04X}")
        return count

    def move(self, identifier: bytes, destination: str) -> int:
        """C-MOVE; how many sub-operations were completed. Unavailable when it did not end with 0000."""
        _, final = self._ask(Field.C_MOVE, identifier, destination)
        if final.status != SUCCESS:
            said = final.text(messages.ERROR_COMMENT)
            raise Unavailable(f"a C-MOVE was answered {final.status:04X} {said}".rstrip())
        return final.short(messages.COMPLETED_SUBOPERATIONS, 0)

    def release(self) -> None:
        self._line.release()

    def _ask(self, field: Field, identifier: bytes, destination: str = "") -> tuple[int, Command]:
        """How many responses said that more would come, and the final one."""
        self._message_id = self._message_id % 0xFFFF + 1
        request = self._line.command(messages.query_request(field, self._message_id, self._sop_class_uid,
                                                            move_destination=destination))
        header = data_header(CONTEXT_ID, LAST_FRAGMENT, len(identifier))
        self._line.sock.sendall(request + header + identifier)
        pending = 0
        while True:
            kind, body = self._line.read()
            if kind != PduType.P_DATA_TF:
                raise ConnectionError(f"PDU type {kind} in place of a response")
            for control, fragment in _fragments(body):
                if control & COMMAND_FRAGMENT:
                    answer = messages.parse(fragment)
                    if answer.status not in (PENDING, PENDING_UNSUPPORTED_KEYS):
                        return pending, answer
                    pending += 1


def _fragments(body: bytes) -> Iterator[tuple[int, bytes]]:
    """The message control header and the octets of each presentation data value; a command has one."""
    at = 0
    while at < len(body):
        end = at + 4 + int.from_bytes(body[at:at + 4], "big")
        yield body[at + 5], body[at + PDV_HEADER_BYTES:end]
        at = end


def study_identifier(question: Question) -> bytes:
    """The question as a workstation asks it (PS3.4 C.6.2.1)."""
    values = {"QueryRetrieveLevel": "STUDY", question.keyword: question.value}
    return element("SpecificCharacterSet", "ISO_IR 192") + b"".join(
        element(keyword, values.get(keyword, "")) for keyword in _WANTED)


def retrieve_identifier(study_uid: str) -> bytes:
    """A whole study (PS3.4 C.4.2.2.1)."""
    return element("QueryRetrieveLevel", "STUDY") + element("StudyInstanceUID", study_uid)
