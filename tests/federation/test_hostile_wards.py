"""Wards whose node was taken over: what they say over the real wire with a good certificate, by raw calls.
They change nothing of another ward's, and stop nobody else."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from archive.corrections import Correction, fact_of
from archive.model import Fact, FactKind, Level
from archive.removals import Removal, Restoration, fact_of_restoration
from archive.removals import fact_of as removal_fact
from certs.credentials import channel_sync
from federation import serde_facts
from federation.facts_rules import DECIDED_ELSEWHERE, OTHERS_HOLD, UNREADABLE
from federation.hub import Hub
from protos import facts_pb2
from protos.facts_pb2_grpc import FactsStub
from tests.datasets import make_instance
from tests.federation.regions import Region
from tests.federation.test_facts import GALLIERA, MARTINO, in_region, patient_id, regional, undoing
from tests.federation.wards import Node, hub_settings, node_of

STUDY, SERIES = "1.2.3", "1.2.3.1"


@pytest.fixture
def hub(region: Region) -> Iterator[Hub]:
    hub = Hub(hub_settings(region))
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def martino(region: Region, hub: Hub) -> Iterator[Node]:
    """The ward that is wronged: it has given the region a study."""
    node = node_of(region, hub, "San Martino", "Radiology", "SM").start()
    in_region(hub, node, [make_instance(study_uid=STUDY, series_uid=SERIES, sop_uid="1.2.3.1.1")])
    yield node
    node.stop()


@pytest.fixture
def galliera(region: Region, hub: Hub) -> Iterator[Node]:
    """The ward that was taken over."""
    node = node_of(region, hub, "Galliera", "Oncology", "GA")
    yield node
    node.stop()


@pytest.fixture
def channel(galliera: Node, hub: Hub) -> Iterator[Any]:
    """What its certificate opens."""
    with channel_sync(galliera.identity, f"127.0.0.1:{hub.settings.port}") as opened:
        yield opened


def tell(channel: Any, *facts: Fact) -> list[str]:
    """What the region says to each of these, "" where it takes it."""
    request = facts_pb2.TellFacts(log=b"log", facts=map(serde_facts.fact_to, facts))
    refused = {one.index: one.reason for one in FactsStub(channel).Tell(request, timeout=20).refused}
    return [refused.get(number, "") for number in range(len(facts))]


def removal(removal_id: str, uid: str, ward: str, level: Level = Level.STUDY) -> Removal:
    return Removal(removal_id, level, uid, STUDY, "113001", "maria", "blurred", time.time_ns() // 1000, ward)


def test_a_decision_of_others_is_not_taken_back_by_one_whose_id_begins_with_its_own(
    hub: Hub, martino: Node, channel: Any
) -> None:
    archive = regional(hub)
    wrong = Correction("ab" * 8, STUDY, (("PatientID", "999"),), "maria", "wrong", 1000, "")
    hidden = removal("cd" * 16, SERIES, "", Level.SERIES)
    archive.record_facts([fact_of(wrong)])
    ours = replace(wrong, id=wrong.id + "0", study_uid="1.9.9", ward=GALLIERA)
    assert tell(channel, fact_of(ours)) == [""]
    assert tell(channel, replace(undoing(wrong, GALLIERA), sop_instance_uid="1.9.9")) == [DECIDED_ELSEWHERE]
    assert patient_id(archive) == "999"
    archive.record_facts([removal_fact(hidden)])
    mine = removal(hidden.id + "0", "1.9.9", GALLIERA)
    assert tell(channel, removal_fact(mine)) == [""]
    back = Restoration(hidden.id, "1.9.9", "luca", 2000, GALLIERA)
    assert tell(channel, fact_of_restoration(back)) == [DECIDED_ELSEWHERE]
    # Nor by one of the same id, which would count instead of it.
    assert tell(channel, removal_fact(removal(hidden.id, "1.9.9", GALLIERA))) == [DECIDED_ELSEWHERE]
    assert patient_id(archive) == "none"


def test_a_ward_that_puts_one_image_into_another_s_study_removes_none_of_the_others(
    hub: Hub, martino: Node, galliera: Node, channel: Any
) -> None:
    galliera.start()
    in_region(hub, galliera, [make_instance(study_uid=STUDY, series_uid="1.8", sop_uid="1.8.1")])
    assert tell(channel, removal_fact(removal("ab" * 16, STUDY, GALLIERA))) == [OTHERS_HOLD]
    assert tell(channel, removal_fact(removal("ac" * 16, "1.8", GALLIERA, Level.SERIES))) == [""]
    shown = [one.head.provenance.ward for one in regional(hub).instances(STUDY)]
    assert shown == [MARTINO]


@pytest.mark.parametrize("detail", [
    {"id": "\ud800", "level": "STUDY", "study": "", "code": "", "by": "", "reason": ""},
    {"id": "a\0b", "level": "STUDY", "study": "", "code": "", "by": "", "reason": ""},
    {"id": "a" * 9_000, "level": "STUDY", "study": "", "code": "", "by": "", "reason": ""},
    {"id": "abcdef01", "level": "STUDY", "study": "\ud800", "code": "", "by": "", "reason": ""},
    "[" * 15_000,
])  # fmt: skip
def test_a_decision_that_no_index_can_keep_is_refused_and_the_region_goes_on(
    hub: Hub, martino: Node, channel: Any, detail: Any
) -> None:
    body = detail if isinstance(detail, str) else json.dumps(detail)
    ours = Correction("ab" * 8, "1.9.9", (("PatientID", "7"),), "maria", "wrong", 1000, GALLIERA)
    kinds = [FactKind.REMOVED, FactKind.CORRECTED]
    facts = [Fact(kind, "1.9.9", b"", GALLIERA, 1000, body) for kind in kinds]
    assert tell(channel, *facts, fact_of(ours)) == [UNREADABLE, UNREADABLE, ""]
    in_region(hub, martino, [make_instance(study_uid="1.2.4", sop_uid="1.2.4.1")])
