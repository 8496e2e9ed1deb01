"""Valid octets made wrong: conversations of the upper layer and data sets, mutated. Case n is the same on
every run, so that a failing one is replayed by its number. Knows nothing of who reads them."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

from node.dimse import messages, pdu
from node.dimse.messages import Field
from node.dimse.pdu import ProposedContext, Role, UserIdentity
from tests.datasets import (
    BASIC_TEXT_SR,
    BIG_ENDIAN,
    CT,
    DEFLATED,
    ENCAPSULATED_PDF,
    EXPLICIT,
    IMPLICIT,
    MR,
    RLE,
    Instance,
    instance_from_file,
    make_instance,
    shipped_files,
)
from tests.node.serving import AE_TITLE, data

FIND, MOVE, GET = (f"1.2.840.10008.5.1.4.1.2.2.{number}" for number in (1, 2, 3))
COMMITMENT, COMMITTING = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
WORKLIST, STEP, STEP_SHOWN = "1.2.840.10008.5.1.4.31", "1.2.840.10008.3.1.2.3.3", "1.2.840.10008.3.1.2.3.4"
VERIFICATION = "1.2.840.10008.1.1"
CHANGES_MAX = 8
CHUNK_MAX = 200
FILE_BYTES_MAX = 40_000
SHARED = Path(__file__).parents[2] / "shared/data"

# What parsers stumble over: lengths, structure, VRs, PDU and item types.
TOKENS: tuple[bytes, ...] = (
    b"\xff\xff\xff\xff", b"\xff\xff\xff\xfe", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\x00\x00\x00",
    b"\x00\x00\x00\x00", b"\x00\x00\x00\x01", b"\x01\x00\x00\x00", b"\xff\xff", b"\x00\x00", b"\x00\x01",
    b"\xfe\xff\x00\xe0\xff\xff\xff\xff", b"\xfe\xff\x0d\xe0\x00\x00\x00\x00",
    b"\xfe\xff\xdd\xe0\x00\x00\x00\x00", b"\xfe\xff\x00\xe0\x00\x00\x00\x00",
    b"\x40\x00\x75\x02SQ\x00\x00\xff\xff\xff\xff", b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff",
    b"\x09\x00\x01\x10UN\x00\x00\xff\xff\xff\xff", b"\xe0\x7f\x10\x00OW\x00\x00\xff\xff\xff\xff",
    b"\x20\x00\x0d\x00UI", b"\x08\x00\x18\x00UI", b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 192",
    b"SQ", b"UN", b"OB", b"UI", b"UT", b"\0\0", b"zz", b"../../../x", b"1.2.3", b"\\", b"\x1b$B", b"%s",
    b"\x01\x00", b"\x02\x00", b"\x04\x00", b"\x05\x00", b"\x07\x00", b"\x10\x00", b"\x20\x00\x00\x2e",
    b"\x30\x00\x00\x11", b"\x40\x00\x00\x11", b"\x50\x00\x00\x3a", b"\x51\x00\x00\x04", b"\x53\x00\x00\x04",
    b"\x54\x00\x00\x04", b"\x56\x00\x00\x04", b"\x58\x00\x00\x08\x02\x01",
)  # fmt: skip


def mutate(chance: random.Random, octets: bytes, others: Sequence[bytes]) -> bytes:
    """`octets` with up to CHANGES_MAX changes; `others` are there to be spliced in."""
    changed = bytearray(octets)
    for _ in range(chance.choice([1, 1, 1, 2, 3, CHANGES_MAX])):
        _change(chance, changed, others)
    return bytes(changed)


def _change(chance: random.Random, octets: bytearray, others: Sequence[bytes]) -> None:
    at = chance.randrange(len(octets) + 1)
    end = min(at + chance.randint(1, CHUNK_MAX), len(octets))
    kind = chance.randrange(11)
    if kind <= 1 and at < len(octets):
        octets[at] ^= 1 << chance.randrange(8)
    elif kind == 2 and at < len(octets):
        octets[at] = chance.randrange(256)
    elif kind == 3:
        del octets[at:]
    elif kind == 4:
        del octets[at:end]
    elif kind == 5:
        octets[at:at] = octets[at:end] * chance.choice([1, 1, 2, 50])
    elif kind == 6:  # two neighbours change places
        middle = (at + end) // 2
        octets[at:end] = octets[middle:end] + octets[at:middle]
    elif kind == 7:  # a length that lies, wherever there is one
        order, code = chance.choice("<>"), chance.choice("HI")
        value = chance.choice([0, 1, len(octets), (1 << 15) - 1, (1 << 16) - 1, chance.randrange(1 << 16)])
        lie = struct.pack(order + code, value)
        octets[at : at + len(lie)] = lie
    elif kind == 8:
        token = chance.choice(TOKENS)
        octets[at : at + len(token)] = token
    elif kind == 9:
        octets[at:at] = chance.choice(TOKENS)
    else:
        other = chance.choice(others)
        start = chance.randrange(len(other) + 1)
        octets[at:] = other[start:]


# ---------------------------------------------------------------- conversations


def conversation(number: int) -> tuple[bytes, bytes]:
    """What a peer sends over one connection, mutated: at once, and when that was answered. In most cases the
    association is left whole, so that what follows is read; who does not wait for its answer is aborted."""
    chance = random.Random(f"conversation {number}")
    plain = conversations()
    pdus = list(chance.choice(plain))
    whole = [b"".join(each) for each in plain]
    if chance.random() < 0.3:  # whole PDUs, out of their order
        for _ in range(chance.randint(1, 3)):
            first, second = chance.randrange(len(pdus)), chance.randrange(len(pdus))
            action = chance.randrange(4)
            if action == 0:
                pdus[first], pdus[second] = pdus[second], pdus[first]
            elif action == 1:
                pdus.insert(first, pdus[second])
            elif action == 2 and len(pdus) > 1:
                del pdus[first]
            else:
                pdus.insert(first, chance.choice(chance.choice(plain)))
    if chance.random() < 0.65:
        return pdus[0], mutate(chance, b"".join(pdus[1:]), whole)
    return mutate(chance, b"".join(pdus), whole), b""


@lru_cache(maxsize=1)
def conversations() -> tuple[tuple[bytes, ...], ...]:
    """Valid ones, as their PDUs."""
    small, padded = _grown(1), _grown(2, padding=6000)
    deflated = _grown(3, transfer_syntax=DEFLATED)
    many = tuple(ProposedContext(2 * n + 1, sop_class, syntaxes) for n, (sop_class, syntaxes) in enumerate([
        (VERIFICATION, (IMPLICIT,)), (CT, (EXPLICIT,)), (CT, (IMPLICIT,)), (MR, (EXPLICIT, IMPLICIT)),
        (CT, (DEFLATED,)), (FIND, (IMPLICIT,)), ("1.2.3.4", (EXPLICIT,)),
    ]))  # fmt: skip
    plain = _request(many)
    rich = pdu.encode_request(pdu.AssociateRequest(
        AE_TITLE, "CT1", many, 16384, roles=(Role(CT, True, True), Role(MR, False, True)),
        extended=((FIND, b"\1\1\1"),), asynchronous_window=(4, 4),
        user_identity=UserIdentity(2, True, b"somebody", b"secret"),
    ))  # fmt: skip
    ward = tuple(ProposedContext(2 * n + 1, sop_class, (IMPLICIT,)) for n, sop_class in enumerate(
        [VERIFICATION, CT, MOVE, GET, COMMITMENT, WORKLIST, STEP, STEP_SHOWN]))
    whole = pdu.encode_request(pdu.AssociateRequest(
        AE_TITLE, "CT1", ward, 16384, roles=(Role(CT, True, True), Role(COMMITMENT, True, True)),
        asynchronous_window=(4, 4)))
    identifier = _identifier()
    found = data(11, 3, messages.query_request(Field.C_FIND, 1, FIND)) + data(11, 2, identifier)
    return (
        (plain, data(1, 3, messages.echo_request(1)), pdu.RELEASE_RQ_OCTETS),
        (rich, data(1, 3, messages.echo_request(7)), pdu.RELEASE_RQ_OCTETS),
        (plain, *_store(3, 1, small, 100_000), *_store(3, 2, padded, 700), pdu.RELEASE_RQ_OCTETS),
        (rich, *_store(9, 1, deflated, 300), data(1, 3, messages.echo_request(2)), pdu.RELEASE_RQ_OCTETS),
        (plain, found, data(11, 3, messages.cancel_request(1)), pdu.RELEASE_RQ_OCTETS),
        (rich, found, *_store(3, 2, small, 200), pdu.encode_abort(0, 0)),
        (plain, *_store(3, 1, padded, 1500)[:3], pdu.encode_abort(2, 6)),
        *((whole, *asked, pdu.RELEASE_RQ_OCTETS) for asked in _asked_of_a_ward()),
    )


def _asked_of_a_ward() -> Iterator[tuple[bytes, ...]]:
    """Retrieves, commitment, worklist and performed steps, as their PDUs."""
    wanted = _implicit({0x00080052: b"STUDY", 0x0020000D: b"1.2.3.2.1\\1.2.3.2.2"})
    stored = messages.response(messages.parse(messages.store_request(1, CT, "1.2.3.1.1")), 0)
    move = messages.query_request(Field.C_MOVE, 1, MOVE, move_destination="CT1")
    yield data(5, 3, move), data(5, 2, wanted), data(5, 3, messages.cancel_request(1))
    get = data(7, 3, messages.query_request(Field.C_GET, 1, GET)), data(7, 2, wanted)
    yield *_store(3, 1, _grown(1, transfer_syntax=IMPLICIT), 200), *get, data(3, 3, stored)
    yield *get, data(7, 3, messages.cancel_request(1)), data(1, 3, messages.echo_request(2))
    for field, kind in ((Field.N_ACTION, messages.ACTION_TYPE_ID),
                        (Field.N_EVENT_REPORT, messages.EVENT_TYPE_ID)):
        request = messages.normalized_request(field, 1, COMMITMENT, COMMITTING, has_dataset=True,
                                              more=messages.short(kind, 1))
        yield data(9, 3, request), data(9, 2, _committed()), data(1, 3, messages.echo_request(2))
    yield data(11, 3, messages.query_request(Field.C_FIND, 1, WORKLIST)), data(11, 2, _scheduled())
    steps = [messages.normalized_request(field, number, STEP, "1.2.3.9", has_dataset=True)
             for number, field in enumerate((Field.N_CREATE, Field.N_SET), 1)]
    shown = messages.normalized_request(Field.N_GET, 3, STEP_SHOWN, "1.2.3.9", has_dataset=False)
    yield (data(13, 3, steps[0]), data(13, 2, _performed()), data(13, 3, steps[1]), data(13, 2, _ended()),
           data(15, 3, shown))


def _sequence(tag: int, *items: bytes) -> dict[int, bytes]:
    return {tag: b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item for item in items)}


def _committed() -> bytes:
    items = [_implicit({0x00081150: CT.encode(), 0x00081155: b"1.2.3.1.%d" % n}) for n in (1, 2, 3)]
    return _implicit({0x00081195: b"1.2.3.8"} | _sequence(0x00081199, *items))


def _scheduled() -> bytes:
    step = {0x00080060: b"CT", 0x00400001: b"CT1", 0x00400002: b"20260101-", 0x00400003: b""}
    return _implicit({0x00100010: b"ROSSI*", 0x00100020: b""} | _sequence(0x00400100, _implicit(step)))


def _performed() -> bytes:
    study = _implicit({0x00080050: b"A1", 0x0020000D: b"1.2.3.2.1", 0x00400009: b"S1", 0x00401001: b"R1"})
    return _implicit({0x00080060: b"CT", 0x00100010: b"ROSSI^MARIA", 0x00400241: b"CT1",
                      0x00400244: b"20260101", 0x00400245: b"0930", 0x00400252: b"IN PROGRESS",
                      0x00400253: b"P1"} | _sequence(0x00400270, study))


def _ended() -> bytes:
    return _implicit({0x00400250: b"20260101", 0x00400251: b"0940", 0x00400252: b"COMPLETED"}
                     | _sequence(0x00400340, _implicit({0x0020000E: b"1.2.3.3.1"})))


def _request(contexts: tuple[ProposedContext, ...]) -> bytes:
    return pdu.encode_request(pdu.AssociateRequest(AE_TITLE, "CT1", contexts, 16384))


def _store(context: int, message_id: int, instance: Instance, step: int) -> tuple[bytes, ...]:
    command = messages.store_request(message_id, instance.sop_class_uid, instance.sop_instance_uid)
    starts = range(0, len(instance.dataset), step)
    return (data(context, 3, command),
            *(data(context, 2 if at + step >= len(instance.dataset) else 0, instance.dataset[at:at + step])
              for at in starts))


def _identifier() -> bytes:
    return _implicit({0x00080020: b"20260101-", 0x00080052: b"STUDY", 0x00100010: b"ROSSI*", 0x00100020: b"",
                      0x0020000D: b""})


def _implicit(elements: Mapping[int, bytes]) -> bytes:
    octets = b""
    for tag, value in sorted(elements.items()):
        value += b" " * (len(value) % 2)
        octets += struct.pack("<HHI", tag >> 16, tag & 0xFFFF, len(value)) + value
    return octets


# ---------------------------------------------------------------- data sets


@dataclass(frozen=True, slots=True)
class Mutant:
    """A data set that was mutated, under the name that its sender gives it."""

    instance: Instance
    dataset: bytes


def mutant(number: int) -> Mutant:
    chance = random.Random(f"data set {number}")
    found = instances()
    chosen = chance.choice(found)
    return Mutant(chosen, mutate(chance, chosen.dataset, [each.dataset for each in found]))


@lru_cache(maxsize=1)
def instances() -> tuple[Instance, ...]:
    """Many kinds of objects and of encodings: grown here, shipped with pydicom, and real ones where they
    are."""
    grown = [_grown(n, transfer_syntax=syntax, padding=500 * n)
             for n, syntax in enumerate([EXPLICIT, IMPLICIT, BIG_ENDIAN, DEFLATED, RLE], 10)]
    grown += [
        _grown(20, frames=3, transfer_syntax=RLE, offset_table="extended"),
        _grown(21, sop_class=BASIC_TEXT_SR, modality="SR", rows=0, ContentSequence=_nested(6)),
        _grown(22, sop_class=BASIC_TEXT_SR, modality="SR", rows=0, transfer_syntax=IMPLICIT,
               ContentSequence=_nested(6)),
        _grown(23, sop_class=ENCAPSULATED_PDF, modality="DOC", rows=0, EncapsulatedDocument=b"%PDF" * 99),
        _grown(24, SpecificCharacterSet=["", "ISO 2022 IR 87"], patient_name="Yamada^Tarou"),
    ]
    paths = [path for path in shipped_files() if path.stat().st_size <= FILE_BYTES_MAX]
    paths += sorted(path for path in SHARED.glob("public/**/*.dcm")
                    if path.stat().st_size <= FILE_BYTES_MAX // 2)[:60]
    for path in paths:
        try:
            grown.append(instance_from_file(path))
        except (AttributeError, KeyError, ValueError, TypeError):
            continue  # no instance, or not one that pydicom reads
    return tuple(grown)


def _grown(number: int, **rest: Any) -> Instance:
    """An instance whose UIDs are the same on every run."""
    return make_instance(sop_uid=f"1.2.3.1.{number}", study_uid=f"1.2.3.2.{number}",
                         series_uid=f"1.2.3.3.{number}", number=number, **rest)


def _nested(depth: int) -> Items:
    item = Dataset()
    item.ValueType = "CONTAINER"
    if depth:
        item.ContentSequence = _nested(depth - 1)
    return Items([item, Dataset()])
