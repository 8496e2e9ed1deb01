"""Hostile data sets, grown here: each costs bounded time and memory in the node's own process and gets the
status that the standard has for it (PS3.4 Table B.2-1, PS3.7 Annex C). What is stored is stored as it
came."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from pydicom._uid_dict import UID_dictionary

from archive.archive import Archive, ArchiveSettings
from archive.ledger import Device
from node.dimse import messages
from node.dimse.contexts import STORAGE_CLASSES, Offer
from node.dimse.pdu import AssociateRequest, ContextResult, ProposedContext
from node.dimse.requestor import Requestor, echo
from tests.datasets import BIG_ENDIAN, CT, DEFLATED, EXPLICIT, IMPLICIT, MR, Instance, make_instance
from tests.forked import PATIENT, Forked, forked
from tests.node.serving import Raw, data
from tests.node.storing import storing

MB = 1 << 20
CPU_S_MAX = 1.0           # of one object, its transport of up to 20 MB included
GROWTH_BYTES_MAX = 64 * MB
SEQUENCE = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
ITEM = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
ITEM_END = struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
SEQUENCE_END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
STUDY_UID = struct.pack("<HH", 0x0020, 0x000D)
PATIENT_NAME = struct.pack("<HH", 0x0010, 0x0010)


def element(group: int, number: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    """An explicit little endian element; `length` is what it says, if not the truth."""
    length = len(value) if length is None else length
    if vr in (b"OB", b"OW", b"SQ", b"UN", b"UT", b"UC"):
        return struct.pack("<HH2sHI", group, number, vr, 0, length) + value
    return struct.pack("<HH2sH", group, number, vr, length) + value


@cache
def good() -> Instance:
    return make_instance(rows=0)


def before(tag: bytes, what: bytes, instance: Instance | None = None) -> bytes:
    """A good data set with something before one of its elements."""
    dataset = (instance or good()).dataset
    at = dataset.index(tag)
    return dataset[:at] + what + dataset[at:]


def deflated(*pieces: bytes) -> bytes:
    deflate = zlib.compressobj(wbits=-15)
    return b"".join(deflate.compress(piece) for piece in pieces) + deflate.flush()


def zeros(count: int) -> list[bytes]:
    return [bytes(MB)] * (count // MB)


def instead(tag: bytes, value: bytes) -> bytes:
    """A good data set with another value in one element of a short form."""
    dataset = good().dataset
    at = dataset.index(tag)
    group, number, vr, length = struct.unpack_from("<HH2sH", dataset, at)
    return dataset[:at] + element(group, number, vr, value) + dataset[at + 8 + length :]


def nested(depth: int) -> bytes:
    return (SEQUENCE + ITEM) * depth + (ITEM_END + SEQUENCE_END) * depth


def nested_with_lengths(depth: int) -> bytes:
    inner = b""
    for _ in range(depth):
        inner = element(0x0008, 0x1140, b"SQ", struct.pack("<HHI", 0xFFFE, 0xE000, len(inner)) + inner)
    return inner


def many(count: int, what: bytes) -> bytes:
    return what * count


TINY = element(0x0010, 0x4000, b"LT", b"")
STORED, MISMATCH, NOT_UNDERSTOOD, RESOURCES = {0x0000}, {0xA900}, {0xC000}, {0xA700}

# What, in which transfer syntax, and the status it gets.
HOSTILE: dict[str, tuple[Callable[[], bytes], str, set[int]]] = {
    "a bomb of 256 MB in the pixel data": (
        lambda: deflated(good().dataset, element(0x7FE0, 0x0010, b"OW", b"", 256 * MB), *zeros(256 * MB)),
        DEFLATED, STORED),
    "a bomb of 64 MB before the study": (
        lambda: deflated(before(STUDY_UID, b"")[: good().dataset.index(STUDY_UID)],
                         element(0x0011, 0x0010, b"OB", b"", 64 * MB), *zeros(64 * MB),
                         good().dataset[good().dataset.index(STUDY_UID) :]),
        DEFLATED, RESOURCES),
    "a bomb of nested sequences": (
        lambda: deflated(before(PATIENT_NAME, nested(500_000))), DEFLATED, NOT_UNDERSTOOD | RESOURCES),
    "a bomb that is cut": (lambda: deflated(good().dataset)[:-40], DEFLATED, NOT_UNDERSTOOD | MISMATCH),
    "sequences 2,000 deep": (lambda: before(PATIENT_NAME, nested(2_000)), EXPLICIT, NOT_UNDERSTOOD),
    "sequences 2,000 deep, with lengths": (
        lambda: before(PATIENT_NAME, nested_with_lengths(2_000)), EXPLICIT, STORED),
    "sequences 200,000 deep, never closed": (
        lambda: before(PATIENT_NAME, (SEQUENCE + ITEM) * 200_000), EXPLICIT, NOT_UNDERSTOOD),
    "sequences 2,000 deep behind the index's elements": (
        lambda: good().dataset + element(0x0040, 0xA730, b"SQ", b"", 0xFFFFFFFF) + nested(2_000),
        EXPLICIT, NOT_UNDERSTOOD),
    "a length of 4 GB": (
        lambda: before(PATIENT_NAME, element(0x0009, 0x1001, b"OB", b"x" * 100, 0xFFFFFFFE)), EXPLICIT,
        NOT_UNDERSTOOD),
    "a length of 4 GB, implicit": (
        lambda: struct.pack("<HHI", 0x0008, 0x0005, 0xFFFFFFF0) + b"x" * 100, IMPLICIT, NOT_UNDERSTOOD),
    "an item of 4 GB": (
        lambda: before(PATIENT_NAME, SEQUENCE + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFE) + b"x" * 99),
        EXPLICIT, NOT_UNDERSTOOD),
    "undefined length on text": (
        lambda: before(PATIENT_NAME, element(0x0008, 0x4000, b"UT", b"x" * 50, 0xFFFFFFFF)), EXPLICIT,
        NOT_UNDERSTOOD),
    "undefined lengths everywhere": (
        lambda: many(20_000, element(0x0009, 0x1001, b"UN", b"", 0xFFFFFFFF)), EXPLICIT, NOT_UNDERSTOOD),
    "a million elements before the study": (
        lambda: before(STUDY_UID, many(1_000_000, TINY)), EXPLICIT, RESOURCES),
    "a million elements behind the identity": (
        lambda: good().dataset + many(1_000_000, element(0x0043, 0x1000, b"LO", b"")), EXPLICIT,
        STORED | RESOURCES),
    "a million items in a sequence of the index": (
        lambda: good().dataset + element(0x0040, 0x0275, b"SQ", b"", 0xFFFFFFFF)
        + many(1_000_000, struct.pack("<HHI", 0xFFFE, 0xE000, 0)) + SEQUENCE_END, EXPLICIT, RESOURCES),
    "20 MB of text before the study": (
        lambda: before(STUDY_UID, element(0x0011, 0x1001, b"UT", b"x" * (20 * MB))), EXPLICIT, STORED),
    "20 MB of unknown bytes before the patient": (
        lambda: before(PATIENT_NAME, element(0x0009, 0x1001, b"UN", b"\xff" * (20 * MB))), EXPLICIT, STORED),
    "a name of 20 MB": (
        lambda: instead(PATIENT_NAME, b"").replace(
            element(0x0010, 0x0010, b"PN", b""), element(0x0010, 0x0010, b"UN", b"A" * (20 * MB))),
        EXPLICIT, STORED),
    "30,000 names": (lambda: instead(PATIENT_NAME, b"A\\" * 30_000), EXPLICIT, STORED),
    "30,000 character sets": (
        lambda: instead(struct.pack("<HH", 8, 5), b"\\ISO 2022 IR 87" * 4_000), EXPLICIT, STORED),
    "a study named by a path": (
        lambda: instead(STUDY_UID, b"../../../../etc/miss"), EXPLICIT, MISMATCH),
    "a study named by 65 characters": (lambda: instead(STUDY_UID, b"1." * 32 + b"1\0"), EXPLICIT, MISMATCH),
    "a series named by a command": (
        lambda: instead(struct.pack("<HH", 0x20, 0x0E), b"1.2;touch x "), EXPLICIT, MISMATCH),
    "an instance named otherwise": (
        lambda: instead(struct.pack("<HH", 8, 0x18), b"1.2.3.4"), EXPLICIT, MISMATCH),
    "no study": (lambda: instead(STUDY_UID, b""), EXPLICIT, MISMATCH),
    "two studies": (
        lambda: before(STUDY_UID, element(0x0020, 0x000D, b"UI", b"1.2.3\0")), EXPLICIT, NOT_UNDERSTOOD),
    "all ones": (lambda: b"\xff" * MB, EXPLICIT, NOT_UNDERSTOOD),
    "all ones, big endian": (lambda: b"\xff" * MB, BIG_ENDIAN, NOT_UNDERSTOOD),
    "all zeros": (lambda: bytes(MB), IMPLICIT, NOT_UNDERSTOOD | MISMATCH),
    "a web page": (
        lambda: b"<html><script>alert(1)</script></html>" * 999, EXPLICIT, NOT_UNDERSTOOD | MISMATCH),
    "one octet": (lambda: b"\x08", EXPLICIT, NOT_UNDERSTOOD | MISMATCH),
}  # fmt: skip


def send(node: Forked, dataset: bytes, syntax: str, uid: str) -> int:
    proposed = [ProposedContext(1, CT, (syntax,))]
    with Requestor.connect(node.peer, "CT1", proposed, limits=PATIENT) as requestor:
        context = requestor.context(CT, syntax)
        assert context is not None
        return requestor.store(context, uid, [dataset])


def test_hostile_data_sets_cost_little_and_get_their_status(tmp_path: Path) -> None:
    grown = {name: grow() for name, (grow, _, _) in HOSTILE.items()}
    wrong: dict[str, str] = {}
    stored: dict[str, bytes] = {}
    with forked(tmp_path) as node:
        assert echo(node.peer, "CT1") == 0
        start = node.rss
        for name, dataset in grown.items():
            _, syntax, expected = HOSTILE[name]
            before_s, before_rss = node.cpu_s, node.rss
            status = send(node, dataset, syntax, good().sop_instance_uid)
            cost, growth = node.cpu_s - before_s, node.rss - before_rss
            if status not in expected:
                wrong[name] = f"{status:04X}"
            if cost > CPU_S_MAX or growth > GROWTH_BYTES_MAX:
                wrong[name] = f"{cost:.2f} s, {growth / MB:.0f} MB"
            if status == 0:
                stored[name] = dataset
        assert not wrong
        assert node.rss - start < GROWTH_BYTES_MAX
        assert send(node, good().dataset, EXPLICIT, good().sop_instance_uid) == 0
        node.check_no_surprise()
        for planted in ("etc/miss", "touch", "script"):
            assert planted not in node.log()
    assert {entry.name.partition("-")[0] for entry in tmp_path.iterdir()} == {"state", "ledger.db", "log"}
    with Archive.open(ArchiveSettings(state=tmp_path / "state", free_bytes_min=0), outbox=True) as archive:
        (live,) = archive.instances(good().study_uid)
        contents = {b"".join(archive.dataset_chunks(live.location))}
        contents |= {b"".join(archive.dataset_chunks(row.location)) for row in archive.index.conflicts(100)}
        assert contents == {*stored.values(), good().dataset}  # one UID: the first is live, the others kept


# ---------------------------------------------------------------- statuses of the command's own


def answer(raw: Raw, command: bytes, dataset: bytes) -> int:
    raw.send(data(1, 3, command) + data(1, 2, dataset))
    kind, body = raw.receive()
    assert kind == 4
    return messages.parse(body[6:]).status


def test_what_the_command_names_has_a_status_of_its_own(tmp_path: Path) -> None:
    ct, mr = good(), make_instance(sop_class=MR, rows=0)
    request = AssociateRequest("MISS", "CT1", (ProposedContext(1, CT, (EXPLICIT,)),), 16384)
    uid = ct.sop_instance_uid
    with storing(tmp_path) as served:
        with Raw(served.port) as raw:
            raw.associate(request)
            for no_uid in ("../../../x", "1.2/3", "abc", "1." * 32 + "1", "1.02"):
                assert answer(raw, messages.store_request(1, CT, no_uid), ct.dataset) == 0x0117
            assert answer(raw, messages.store_request(2, CT, "1.2.3"), ct.dataset) == 0xA900
            assert answer(raw, messages.store_request(3, MR, uid), mr.dataset) == 0xA900
            for not_stored in ("1.2.840.10008.1.1", "1.2.3.4.5", "../../x", "1.2.840.10008.5.1.4.38.1"):
                assert answer(raw, messages.store_request(4, not_stored, uid), ct.dataset) == 0x0122
            assert answer(raw, messages.store_request(5, CT, uid), b"no data set at all") == 0xC000
            assert answer(raw, messages.store_request(6, CT, uid), ct.dataset) == 0x0000
        # A device that may send CT alone, and says MR.
        served.ledger.add_device(Device("CT1", "127.0.0.1", "CT, room 1", sop_classes=frozenset({CT})))
        with Raw(served.port) as raw:
            raw.associate(request)
            assert answer(raw, messages.store_request(1, MR, mr.sop_instance_uid), mr.dataset) == 0x0124
            assert answer(raw, messages.store_request(2, CT, uid), ct.dataset) == 0x0000
        assert served.totals().instances == 1
    with storing(tmp_path / "full", free_bytes_min=1 << 60) as served, Raw(served.port) as raw:
        raw.associate(request)
        assert answer(raw, messages.store_request(1, CT, uid), ct.dataset) == 0xA700


# ---------------------------------------------------------------- what belongs to no patient


NON_PATIENT = {
    "Hanging Protocol": "1.2.840.10008.5.1.4.38.1",
    "Color Palette": "1.2.840.10008.5.1.4.39.1",
    "Generic Implant Template": "1.2.840.10008.5.1.4.43.1",
    "Implant Assembly Template": "1.2.840.10008.5.1.4.44.1",
    "Implant Template Group": "1.2.840.10008.5.1.4.45.1",
    "CT Defined Procedure Protocol": "1.2.840.10008.5.1.4.1.1.200.1",
    "Protocol Approval": "1.2.840.10008.5.1.4.1.1.200.3",
    "XA Defined Procedure Protocol": "1.2.840.10008.5.1.4.1.1.200.7",
    "Inventory": "1.2.840.10008.5.1.4.1.1.201.1",
}


@pytest.mark.parametrize("name", NON_PATIENT)
def test_objects_without_a_patient_are_refused_when_they_are_proposed(tmp_path: Path, name: str) -> None:
    """PS3.4 GG: they have no study to lie in. Refused before a byte is sent, not after each object."""
    uid = NON_PATIENT[name]
    assert name in UID_dictionary[uid][0]
    assert uid not in STORAGE_CLASSES and Offer(private=True).service(uid) is None


def test_a_proposal_of_them_leaves_the_others(tmp_path: Path) -> None:
    contexts = tuple(ProposedContext(2 * n + 1, uid, (EXPLICIT,))
                     for n, uid in enumerate([*NON_PATIENT.values(), CT]))
    with storing(tmp_path) as served, Raw(served.port) as raw:
        accept = raw.associate(AssociateRequest("MISS", "CT1", contexts, 16384))
        results = [answered.result for answered in accept.contexts]
    assert results == [ContextResult.ABSTRACT_SYNTAX_NOT_SUPPORTED] * 9 + [ContextResult.ACCEPTANCE]
