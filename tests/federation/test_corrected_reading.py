"""What is corrected reaches a reader as corrected, wherever the bytes come from: the region's packs, a ward
that alone holds them, or the region for another ward's device. Between archives they travel as they came."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import BytesIO

import pydicom
import pytest

from archive.corrections import Correction, fact_of
from archive.model import StoredInstance
from federation import promoting
from federation.hub import Hub
from federation.policy import Principal, Reach, Role
from federation.settings import WindowSettings
from federation.window import RegionWindow
from node.dimse.payloads import Payloads
from tests.datasets import EXPLICIT, IMPLICIT, Instance, make_instance
from tests.federation.regions import Region
from tests.federation.wards import EVA, Node, Regional, hub_settings, node_of, stored_bytes
from tests.waiting import wait_for

OWN = "san-martino/radiology"
STUDY = "1.2.3"
CORRECTED = Correction("ab" * 8, STUDY, (("PatientID", "999"),), "maria", "wrong", 1000, "")


@pytest.fixture
def hub(region: Region) -> Iterator[Hub]:
    hub = Hub(hub_settings(region, devices_see_region=(OWN,)))
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def wards(region: Region, hub: Hub) -> Iterator[list[Node]]:
    """One that looks at the region, and one that holds the study."""
    nodes = [node_of(region, hub, "San Martino", "Radiology", "SM"),
             node_of(region, hub, "Galliera", "Radiology", "GA")]  # fmt: skip
    yield nodes
    for node in nodes:
        node.stop()


def correct(hub: Hub) -> None:
    assert hub._writer is not None
    hub._writer.archive.record_facts([fact_of(CORRECTED)])


def check(whole: bytes, instance: Instance) -> None:
    got = pydicom.dcmread(BytesIO(whole))
    assert got.PatientID == "999" and got.PixelData == instance.read().PixelData
    assert got.OriginalAttributesSequence[0].ModifiedAttributesSequence[0].PatientID == "123"


@pytest.mark.parametrize("large", [False, True])
def test_what_only_a_ward_holds_is_read_as_corrected_in_the_region(
    region: Region, hub: Hub, wards: list[Node], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promoting, "PASSED_ON_BYTES_MIN", 1 if large else 1 << 30)
    holder = wards[1]
    instance = make_instance(study_uid=STUDY)
    holder.take([instance])
    holder.start(hold=True)
    wait_for(lambda: holder.reported(region).pending == 1, "it says that it alone has it")
    correct(hub)
    with Regional(region, hub) as source:
        (found,) = source.instances(EVA, STUDY)
        check(b"".join(source.passing(EVA, found)), instance)
        (found,) = source.instances(EVA, STUDY)
        with source.open_payload(found) as payload:
            check(payload.read(), instance)
    assert hub._writer is not None
    assert stored_bytes(hub._writer.archive, instance) == instance.dataset


def fetched(payloads: Payloads, who: Principal, found: StoredInstance, syntax: str) -> bytes:
    with payloads.supply(who) as supply:
        source = supply.open(found, syntax)
        data = bytearray(source.length)
        at = 0
        while at < len(data):
            at += source.read_into([memoryview(data)[at:]], at)
        source.confirm()
        source.close()
    return bytes(data)


def test_another_ward_s_device_gets_it_as_corrected_in_any_syntax(
    region: Region, hub: Hub, wards: Sequence[Node]
) -> None:
    looker, holder = wards
    instance = make_instance(study_uid=STUDY)
    holder.start()
    holder.take([instance])
    wait_for(lambda: holder.pending == 0, "the region has it")
    correct(hub)
    looker.start()
    assert looker.uplink is not None
    uplink = looker.uplink
    wait_for(lambda: uplink.status().attached and looker.reported(region).attached, "attached")
    window = RegionWindow(looker.uplink, looker.folder, WindowSettings(), free_bytes=looker.store.free_bytes)
    payloads = Payloads(looker.store, window)
    try:
        who = Principal("WORKSTATION", Role.DEVICE, OWN, reach=Reach.REGION)
        (found,) = window.instances(who, STUDY)
        assert found.corrections is not None and dict(found.corrections.values) == {"PatientID": "999"}
        for syntax in (EXPLICIT, IMPLICIT):
            data = fetched(payloads, who, found, syntax)
            check(replace(instance, transfer_syntax_uid=syntax, dataset=data).part10, instance)
    finally:
        payloads.close()
        window.close()
