"""Forwarding: instances to a device of the list by C-STORE, each with one outcome (PS3.4 C.4.2.3.1)."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pynetdicom import AE, evt

from archive.archive import Archive
from archive.errors import NotFound, Unavailable
from archive.ledger import Device
from archive.model import Location, StoredInstance
from federation.policy import Principal
from federation.spooling import Spool, Spools
from node.destinations import Destinations
from node.dimse.errors import AssociationEnded
from node.dimse.outbox import Source
from node.dimse.payloads import Payloads, Supply
from node.forwarding import Forwarder
from node.settings import TlsSettings
from tests.datasets import CR, CT, EXPLICIT, IMPLICIT, MR, RLE, Instance, make_instance
from tests.node import certificates
from tests.node.certificates import Papers
from tests.node.receiving import Receiver, receiver
from tests.node.storing import Storing, storing
from tests.waiting import wait_for


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Storing]:
    with storing(tmp_path) as running:
        yield running


class Outcomes:
    """What became of each instance."""

    def __init__(self) -> None:
        self.statuses: dict[str, int] = {}
        self.comments: dict[str, str] = {}
        self._lock = threading.Lock()

    def __call__(self, instance: StoredInstance, status: int, comment: str) -> None:
        uid = instance.head.sop_instance_uid
        with self._lock:
            assert uid not in self.statuses, "a second outcome"
            self.statuses[uid], self.comments[uid] = status, comment


def forwarder(served: Storing, peer: Receiver, **options: Any) -> Forwarder:
    served.ledger.add_device(Device("OTHER", "127.0.0.1", "another", port=peer.port))
    return Forwarder(served.archive, Destinations(served.ledger, TlsSettings()), "MISS", **options)


def stored(archive: Archive, *instances: Instance) -> list[StoredInstance]:
    archive.wait_indexed()
    return [archive.instances(one.study_uid, one.series_uid, one.sop_instance_uid)[0] for one in instances]


@pytest.mark.parametrize("associations", [1, 3])
def test_each_arrives_as_it_is_stored(served: Storing, associations: int) -> None:
    sent = [make_instance(number=n, transfer_syntax=syntax, rows=8, columns=8, padding=n * 30_000)
            for n, syntax in enumerate((EXPLICIT, IMPLICIT, RLE) * 4)]
    assert served.send(*sent) == [0] * 12
    outcomes = Outcomes()
    with receiver() as peer:
        forwarder(served, peer, associations=associations).send(
            "OTHER", stored(served.archive, *sent), outcomes, originator=("WS1", 7))
    assert outcomes.statuses == {one.sop_instance_uid: 0 for one in sent}
    assert {uid: got.dataset for uid, got in peer.received.items()} == {
        one.sop_instance_uid: one.dataset for one in sent}
    assert {(got.originator, got.originator_message_id) for got in peer.received.values()} == {("WS1", 7)}
    assert peer.associations == associations


def test_an_unknown_destination_and_one_that_is_away(served: Storing) -> None:
    one = make_instance()
    served.send(one)
    with receiver() as peer:
        sender = forwarder(served, peer)
        with pytest.raises(NotFound):
            sender.send("NOBODY", stored(served.archive, one), Outcomes())
    with pytest.raises(AssociationEnded):
        sender.send("OTHER", stored(served.archive, one), Outcomes())


def test_a_device_listed_with_tls_is_dialled_so(served: Storing, tmp_path: Path) -> None:
    """Each shows the other its certificate; who shows one of another authority gets nothing."""
    region, others = (certificates.Region(tmp_path / name) for name in ("region", "others"))
    ours = region.issue("MISS", into="node")
    destinations = Destinations(served.ledger, TlsSettings(certificate=ours.certificate, key=ours.key,
                                                           trust=ours.trust))
    one = make_instance()
    served.send(one)
    sender, outcomes = Forwarder(served.archive, destinations, "MISS"), Outcomes()
    with storing_over_tls(region.issue("OTHER")) as (port, received):
        served.ledger.add_device(Device("OTHER", "127.0.0.1", port=port, transport="tls"))
        sender.send("OTHER", stored(served.archive, one), outcomes)
    assert (outcomes.statuses, received) == ({one.sop_instance_uid: 0}, [one.sop_instance_uid])
    with storing_over_tls(others.issue("OTHER")) as (port, received):
        served.ledger.add_device(Device("OTHER", "127.0.0.1", port=port, transport="tls"))
        with pytest.raises(AssociationEnded):
            sender.send("OTHER", stored(served.archive, one), Outcomes())
    assert received == []


@contextmanager
def storing_over_tls(papers: Papers) -> Iterator[tuple[int, list[str]]]:
    """pynetdicom's storage SCP over TLS, which asks for a certificate; its port and what it was sent."""
    secure = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(papers.trust))
    secure.verify_mode = ssl.CERT_REQUIRED
    secure.load_cert_chain(papers.certificate, papers.key)
    received: list[str] = []

    def take(event: evt.Event) -> int:
        received.append(str(event.dataset.SOPInstanceUID))
        return 0

    entity = AE("OTHER")
    entity.add_supported_context(CT, EXPLICIT)
    server = entity.start_server(("127.0.0.1", 0), block=False, ssl_context=secure,
                                 evt_handlers=[(evt.EVT_C_STORE, take)])
    assert server is not None
    try:
        yield server.server_address[1], received
    finally:
        server.shutdown()


def test_statuses_and_comments_are_the_peers(served: Storing) -> None:
    sent = [make_instance(number=n) for n in range(3)]
    served.send(*sent)
    outcomes = Outcomes()
    answers = {one.sop_instance_uid: status for one, status in zip(sent, (0, 0xB000, 0xA700), strict=True)}
    with receiver(status=lambda uid: answers[uid], comment="its own words") as peer:
        forwarder(served, peer).send("OTHER", stored(served.archive, *sent), outcomes)
    assert outcomes.statuses == answers
    assert set(outcomes.comments.values()) == {"its own words"}


def test_what_it_does_not_take_is_recoded_or_fails(served: Storing) -> None:
    """MR is not taken at all, CR only in Implicit VR Little Endian."""
    ct, mr, cr = (make_instance(sop_class=uid, transfer_syntax=RLE, rows=16, columns=16)
                  for uid in (CT, MR, CR))
    served.send(ct, mr, cr)
    outcomes = Outcomes()
    takes = {CT: (RLE, EXPLICIT), CR: (IMPLICIT,)}
    with receiver(takes=takes) as peer:
        forwarder(served, peer).send("OTHER", stored(served.archive, ct, mr, cr), outcomes)
    assert outcomes.statuses == {ct.sop_instance_uid: 0, mr.sop_instance_uid: 0x0122, cr.sop_instance_uid: 0}
    assert len(outcomes.comments[mr.sop_instance_uid]) <= 64  # as much as an Error Comment (LO) says
    assert peer.received[ct.sop_instance_uid].dataset == ct.dataset
    got = peer.received[cr.sop_instance_uid]
    assert got.transfer_syntax_uid == IMPLICIT
    assert (got.read().pixel_array == cr.read().pixel_array).all()


def test_a_window_keeps_several_open(served: Storing) -> None:
    sent = [make_instance(number=n) for n in range(8)]
    served.send(*sent)
    outcomes = Outcomes()
    with receiver(window=4, hold=4) as peer:  # answers when four have come, or no more come
        forwarder(served, peer, window=4).send("OTHER", stored(served.archive, *sent), outcomes)
    assert set(outcomes.statuses.values()) == {0} and len(outcomes.statuses) == 8
    assert peer.open_at_once == 4


def test_an_association_that_breaks_costs_what_it_had_not_answered(served: Storing) -> None:
    sent = [make_instance(number=n) for n in range(6)]
    served.send(*sent)
    outcomes = Outcomes()
    with receiver(abort_at={3}) as peer:
        forwarder(served, peer).send("OTHER", stored(served.archive, *sent), outcomes)
    assert sorted(outcomes.statuses.values()) == [0] * 5 + [0x0110]
    assert peer.associations == 2


@pytest.mark.parametrize("associations", [1, 3])
def test_an_error_that_nobody_foresaw_costs_the_one_instance(
        served: Storing, associations: int, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    sent = [make_instance(number=n) for n in range(6)]
    served.send(*sent)
    bad, secret, whole = sent[2].sop_instance_uid, "ROSSI^MARIA", Supply.open

    def opening(self: Supply, instance: StoredInstance, transfer_syntax_uid: str) -> Source:
        if instance.head.sop_instance_uid == bad:
            raise ValueError(secret)
        return whole(self, instance, transfer_syntax_uid)

    monkeypatch.setattr(Supply, "open", opening)
    outcomes = Outcomes()
    with receiver() as peer:
        forwarder(served, peer, associations=associations).send(
            "OTHER", stored(served.archive, *sent), outcomes)
    assert outcomes.statuses == {one.sop_instance_uid: 0x0110 if one is sent[2] else 0 for one in sent}
    assert secret not in caplog.text + outcomes.comments[bad] and "ValueError" in caplog.text


def test_evicted_and_damaged_ones_fail_and_the_rest_arrive(served: Storing) -> None:
    sent = [make_instance(number=n) for n in range(3)]
    served.send(*sent)
    found = stored(served.archive, *sent)
    object.__setattr__(found[0], "evicted", True)
    object.__setattr__(found[1], "damaged", True)
    outcomes = Outcomes()
    with receiver() as peer:
        forwarder(served, peer).send("OTHER", found, outcomes)
    assert [outcomes.statuses[one.sop_instance_uid] for one in sent] == [0xA700, 0x0110, 0]
    assert set(peer.received) == {sent[2].sop_instance_uid}


class Region:
    """What a node's window on the region fetches; `opened` are the files that it gave. `gates` hold back the
    rest of an instance after its first 2 MiB; `broken` ones end there."""

    def __init__(self, folder: Path, *instances: Instance) -> None:
        self._spools = Spools(folder, 64 << 20, free_bytes=lambda: 1 << 40, free_bytes_min=0)
        self._datasets = {one.sop_instance_uid: one.dataset for one in instances}
        self.opened: list[Spool] = []
        self.gates: dict[str, threading.Event] = {}
        self.broken: set[str] = set()

    def begin(self, instance: StoredInstance) -> Spool:
        dataset = self._datasets.get(instance.head.sop_instance_uid)
        if dataset is None:
            raise NotFound("no such instance")
        self.opened.append(self._spools.make(len(dataset)))
        return self.opened[-1]

    def fill(self, principal: Principal, instance: StoredInstance, spool: Spool) -> None:
        uid = instance.head.sop_instance_uid
        dataset = self._datasets[uid]
        spool.take(dataset[:2 << 20])
        if uid in self.broken:
            spool.fail(Unavailable("the line broke"))
            return
        if uid in self.gates:
            assert self.gates[uid].wait(20)
        spool.take(dataset[2 << 20:])
        spool.end(instance.digest)


def test_what_is_fetched_flows_on_while_it_comes(served: Storing, tmp_path: Path) -> None:
    sent = make_instance(padding=6 << 20)
    served.send(sent)
    found = stored(served.archive, sent)
    object.__setattr__(found[0], "evicted", True)
    outcomes, region = Outcomes(), Region(tmp_path, sent)
    gate = region.gates[sent.sop_instance_uid] = threading.Event()
    payloads = Payloads(served.archive, region)
    with receiver() as peer:
        sending = threading.Thread(
            target=forwarder(served, peer, payloads=payloads).send, args=("OTHER", found, outcomes))
        sending.start()
        wait_for(lambda: peer.octets > 1 << 20, "the peer has the beginning")
        assert not peer.received and not gate.is_set()
        gate.set()
        sending.join(20)
    payloads.close()
    assert outcomes.statuses == {sent.sop_instance_uid: 0}
    assert peer.received[sent.sop_instance_uid].dataset == sent.dataset
    assert all(spool.closed for spool in region.opened)


def test_a_fetch_that_breaks_off_costs_that_instance_alone(served: Storing, tmp_path: Path) -> None:
    sent = [make_instance(number=n, padding=(4 << 20) * (n % 2)) for n in range(10)]
    served.send(*sent)
    found = stored(served.archive, *sent)
    for each in found:
        object.__setattr__(each, "evicted", True)
    outcomes, region = Outcomes(), Region(tmp_path, *sent)
    region.broken = {one.sop_instance_uid for one in sent[1::2]}
    payloads = Payloads(served.archive, region)
    with receiver(window=4) as peer:
        forwarder(served, peer, payloads=payloads, window=4).send("OTHER", found, outcomes)
    payloads.close()
    assert [outcomes.statuses[one.sop_instance_uid] for one in sent] == [0, 0xA700] * 5
    assert set(peer.received) == {one.sop_instance_uid for one in sent[::2]}
    assert all(spool.closed for spool in region.opened)


def test_evicted_and_damaged_ones_come_from_the_region(served: Storing, tmp_path: Path) -> None:
    sent = [make_instance(number=n) for n in range(4)]
    served.send(*sent)
    found = stored(served.archive, *sent)
    for each in found[:2]:
        object.__setattr__(each, "evicted", True)
    object.__setattr__(found[2], "damaged", True)
    outcomes, region = Outcomes(), Region(tmp_path, sent[0], sent[2])
    payloads = Payloads(served.archive, region)
    with receiver() as peer:
        forwarder(served, peer, payloads=payloads).send("OTHER", found, outcomes)
    payloads.close()
    assert [outcomes.statuses[one.sop_instance_uid] for one in sent] == [0, 0x0112, 0, 0]
    assert peer.received[sent[0].sop_instance_uid].dataset == sent[0].dataset
    assert peer.received[sent[2].sop_instance_uid].dataset == sent[2].dataset
    assert len(region.opened) == 2 and all(file.closed for file in region.opened)


@pytest.mark.parametrize("padding", [20_000, 3 << 20])
def test_zeros_of_a_hole_are_never_sent(served: Storing, padding: int,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks go between the read and the send: the last fragment does not leave."""
    first, second = make_instance(number=1, padding=padding), make_instance(number=2)
    served.send(first, second)
    found = stored(served.archive, first, second)
    place = found[0].location
    punched = _punch_after_read(served, place, monkeypatch)
    outcomes = Outcomes()
    with receiver() as peer:
        forwarder(served, peer).send("OTHER", found, outcomes)
    assert punched.is_set()
    assert outcomes.statuses == {first.sop_instance_uid: 0xA700, second.sop_instance_uid: 0}
    assert set(peer.received) == {second.sop_instance_uid}


def _punch_after_read(served: Storing, place: Location, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    from archive.packs import holes
    from archive.packs.packs import StoredDataset

    if not holes.can_punch(served.archive.settings.state):
        pytest.skip("the file system makes no holes")
    read_into, punched = StoredDataset.read_into, threading.Event()

    def punching(self: StoredDataset, views: list[memoryview], offset: int) -> int:
        done = read_into(self, views, offset)
        if self._location == place and not punched.is_set():
            punched.set()
            start, end = holes.span_of(place)
            with (served.archive.settings.state / place.pack).open("r+b") as file:
                holes.punch(file.fileno(), start, end - start)
        return done

    monkeypatch.setattr(StoredDataset, "read_into", punching)
    return punched


def test_more_kinds_than_an_association_has_contexts(served: Storing) -> None:
    """70 classes in two syntaxes are 210 contexts."""
    from node.dimse.contexts import STORAGE_CLASSES

    classes = sorted(STORAGE_CLASSES)[:70]
    sent = [make_instance(sop_class=uid, transfer_syntax=syntax, number=n)
            for n, uid in enumerate(classes) for syntax in (EXPLICIT, IMPLICIT)]
    for at in range(0, len(sent), 100):
        assert served.send(*sent[at:at + 100]) == [0] * len(sent[at:at + 100])
    outcomes = Outcomes()
    with receiver() as peer:
        forwarder(served, peer).send("OTHER", stored(served.archive, *sent), outcomes)
    assert outcomes.statuses == {one.sop_instance_uid: 0 for one in sent}
    assert peer.associations == 2
