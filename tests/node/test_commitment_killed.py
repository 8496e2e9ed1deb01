"""Storage commitment by a whole node: killed at every step of it, and with a real hub behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from archive.ledger import Commitment, Device, Ledger
from archive.ledger.commitments import ANSWERING, DONE, OPEN
from federation.hub import Hub
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Peer, Requestor
from node.service import Node
from node.settings import CommitmentSettings, NodeSettings
from tests.datasets import CT, EXPLICIT, Instance, make_study
from tests.federation.regions import Region, make_region
from tests.federation.wards import hub_settings
from tests.node.committing import Modality
from tests.node.processes import Process, enrolled
from tests.node.storing import store
from tests.waiting import wait_for


@pytest.fixture
def region(tmp_path: Path) -> Iterator[Region]:
    made = make_region(tmp_path / "region")
    yield made
    made.ledger.close()


@pytest.fixture
def modality() -> Iterator[Modality]:
    made = Modality()
    yield made
    made.close()


def settings_of(region: Region, folder: Path, modality: Modality, means: str,
                hub: str = "127.0.0.1:1") -> NodeSettings:
    made = enrolled(region, folder, hub)
    ledger = Ledger.open(made.ledger_url)
    ledger.add_device(Device("CT1", "127.0.0.1", port=modality.port))
    ledger.close()
    return replace(made, commitment=CommitmentSettings(
        means=means, same_association_s=0.0, retry_first_s=0.05, retry_max_s=0.2))


def send(port: int, study: Sequence[Instance]) -> None:
    with Requestor.connect(Peer("127.0.0.1", port, "MISS"), "CT1",
                           [ProposedContext(1, CT, (EXPLICIT,))]) as requestor:
        assert [store(requestor, one) for one in study] == [0] * len(study)


def the_one(settings: NodeSettings) -> Commitment:
    """The one request, as another process reads it."""
    ledger = Ledger.open(settings.ledger_url)
    try:
        one, = ledger.commitments()
        return one
    finally:
        ledger.close()


@pytest.mark.parametrize("moment", ["received", "verified", "reported"])
def test_a_killed_node_loses_no_request_and_no_report(region: Region, tmp_path: Path, modality: Modality,
                                                      moment: str) -> None:
    """kill -9 as soon as the request is answered, when its outcome waits to be heard, and when the report was
    heard and its answer was not: then it is heard twice."""
    # A region that nobody answers for holds a request at its first step.
    settings = settings_of(region, tmp_path, modality, "region" if moment == "received" else "node")
    study = make_study(3)
    with Process(settings) as running:
        send(running.port, study)
        if moment == "reported":
            modality.on_event = running.kill
            modality.listen()
        with modality.associated(running.port) as association:
            assert modality.ask(association, study) == 0
            if moment == "verified":
                wait_for(lambda: the_one(settings).tries, "a report in vain")
            elif moment == "reported":
                assert modality.event().kind == 1
            running.kill()
    assert the_one(settings).state == (OPEN if moment == "received" else ANSWERING)
    modality.on_event = lambda: None
    if moment != "reported":
        modality.listen()
    after = replace(settings, commitment=replace(settings.commitment, means="node"))
    with Process(after):
        event = modality.event()
        assert event.kind == 1 and event.committed == {one.sop_instance_uid for one in study}
        wait_for(lambda: the_one(settings).state == DONE, "the end")


def test_with_a_region_committed_means_that_it_has_them(region: Region, tmp_path: Path,
                                                        modality: Modality) -> None:
    """By default, where a node dials a hub: no report while that is away, and one when it is back."""
    modality.listen()
    first = hub_settings(region)
    settings = settings_of(region, tmp_path, modality, "auto", f"127.0.0.1:{first.port}")
    settings = replace(settings, uplink=replace(settings.uplink, backoff_first_s=0.05, backoff_cap_s=0.2,
                                                poll_s=0.02))
    study = make_study(3)
    with Node(settings) as node:
        send(node.dicom_port, study)
        with modality.associated(node.dicom_port) as association:
            assert modality.ask(association, study) == 0
        held = node.ledger.commitments()[0]
        wait_for(lambda: all(one.digest for one in node.ledger.commitment_items(held.id)), "hashing")
        assert modality.events.empty() and the_one(settings).state == OPEN
        hub = Hub(first)
        hub.start()
        try:
            assert modality.event().committed == {one.sop_instance_uid for one in study}
        finally:
            hub.stop()
        assert node.archive.index.pending_summary().count == 0
