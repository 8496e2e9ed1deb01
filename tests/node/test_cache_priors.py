"""Priors of the patients on tomorrow's worklist: what this ward had given up comes back, what another ward
holds is copied as far as the device that the patient is scheduled for may see it, and both stay until the
appointment is over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import pytest

from archive.errors import NotFound, Unavailable
from archive.ledger import Device, ScheduledStep
from archive.ledger.keeping import PRIOR
from archive.model import Level, Location, Match, PatientKey, Provenance, Query, StoredInstance
from archive.space.eviction import EvictionReport
from federation import laying_down, protection
from federation.deliveries_grants import origin_device
from federation.hub import Hub
from federation.policy import Principal, Reach
from federation.source import Answer
from node.cache.policy import DAY_US, Room
from tests.datasets import Instance
from tests.federation.regions import Region, make_region
from tests.federation.wards import stored_bytes
from tests.node.caching import CachingWard, caching, protecting, study
from tests.waiting import wait_for

GALLIERA = "galliera/radiology"
TODAY = datetime.now().replace(hour=12, minute=0, second=0, microsecond=0)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laying_down, "LOOK_S", 0.05)
    monkeypatch.setattr(protection, "_SECOND_US", 1)


@pytest.fixture
def region(tmp_path: Path) -> Region:
    return make_region(tmp_path)


@pytest.fixture
def hub(region: Region) -> Iterator[Hub]:
    with protecting(region) as hub:
        yield hub


class Window:
    """The region as one device sees it: studies of another ward."""

    def __init__(self, *studies: list[Instance]) -> None:
        self.studies = {one[0].study_uid: one for one in studies}
        self.asked: list[str] = []
        self.fetched: list[str] = []
        self.away = False

    def search(self, principal: Principal, query: Query) -> Answer:
        assert principal.reach is Reach.REGION
        self.asked.append(principal.user)
        if self.away:
            return Answer([], [])
        assert query.person == frozenset({PatientKey("SM", "PAT")})
        keys = {"StudyDate": "20240101"}
        return Answer([Match(Level.STUDY, "SM", {"PatientID": "PAT"}, keys | {"StudyInstanceUID": uid},
                             modalities=("CT",), instance_count=len(found))
                       for uid, found in self.studies.items()], [])  # fmt: skip

    def instances(self, principal: Principal, study_uid: str, series_uid: str | None = None,
                  sop_instance_uid: str | None = None) -> list[StoredInstance]:  # fmt: skip
        if study_uid not in self.studies:
            raise NotFound("no such study")
        origin = Provenance(GALLIERA, "SM", "CT9", "CT9", 1)
        return [StoredInstance(one.study_uid, one.series_uid, one.head(origin), one.digest,
                               Location("", 0, len(one.dataset), 0), {}, evicted=True)
                for one in self.studies[study_uid]]  # fmt: skip

    def fetch(self, principal: Principal, instance: StoredInstance) -> BinaryIO:
        if self.away:
            raise Unavailable("the region does not answer")
        self.fetched.append(instance.head.sop_instance_uid)
        (found,) = [one for one in self.studies[instance.study_uid]
                    if one.sop_instance_uid == instance.head.sop_instance_uid]  # fmt: skip
        return BytesIO(found.dataset)


def step(at: datetime, *, patient: str = "PAT", station: str = "CT1", modality: str = "CT") -> ScheduledStep:
    station_item = f',"00400001":{{"vr":"AE","Value":["{station}"]}}' if station else ""
    item = f'{{"00400009":{{"vr":"SH","Value":["1"]}}{station_item}}}'
    dataset = f'{{"00400100":{{"vr":"SQ","Value":[{item}]}}}}'
    return ScheduledStep(f"step-{at:%d%H}-{patient}", "", "", "1", "1.2.99", patient, modality,
                         f"{at:%Y%m%d}", f"{at:%H%M%S}", "SCHEDULED", "command", dataset)  # fmt: skip


def prepared(ward: CachingWard, *, reach: str = "region", rule: str = "") -> None:
    ward.ledger.add_device(Device("CT1", "*", reach=reach))
    ward.rules.write_text(f"[[prefetch]]\n{rule}\n")
    ward.attach()


def priors(ward: CachingWard) -> dict[str, int]:
    return {pin.study_uid: pin.until_us for pin in ward.ledger.pins() if pin.kind == PRIOR}


def give_up_all(ward: CachingWard) -> None:
    ward.settle()

    def counts() -> bool:
        maker = ward.cache.room
        maker._evict(maker.take_survey().candidates, EvictionReport())
        return not maker.take_survey().candidates and not ward.archive.index.cached.studies(0)

    wait_for(counts, "all is given up")


def test_own_priors_come_back_and_stay_until_the_appointment_is_over(region: Region, hub: Hub) -> None:
    tomorrow = TODAY + timedelta(days=1)
    with caching(region, hub) as ward:
        prepared(ward, reach="ward", rule="count = 2\nmodality = 'CT'")
        dated = {"1.2.1": "20240101", "1.2.2": "20250101", "1.2.3": "20260101", "1.2.4": "19900101"}
        made = {uid: study(uid, 2, patient_id="PAT", StudyDate=date) for uid, date in dated.items()}
        for instances in (*made.values(), study("1.2.8", 2, patient_id="OTHER")):
            ward.node.take(instances)
        give_up_all(ward)
        ward.ledger.schedule([step(tomorrow), step(TODAY + timedelta(days=9), patient="OTHER")])
        ward.cache.prefetching.look()
        assert ward.evicted("1.2.3") == ward.evicted("1.2.2") == 0  # the last two
        assert ward.evicted("1.2.1") == ward.evicted("1.2.4") == ward.evicted("1.2.8") == 2
        assert [stored_bytes(ward.archive, one) for one in made["1.2.3"]] == [
            one.dataset for one in made["1.2.3"]]  # fmt: skip
        until_us = int(tomorrow.timestamp() * 1e6) + DAY_US
        assert priors(ward) == {"1.2.2": until_us, "1.2.3": until_us}
        assert ward.cache.room.take_survey().pinned_bytes > 0
        assert not ward.cache.room.take_survey().candidates  # nothing that an appointment needs goes
        last = ward.cache.prefetching.last
        assert (last.steps, last.studies, last.brought, last.copied, last.reason) == (1, 2, 4, 0, "")
        # when it is over they are the first to go
        ward.cache.room._clock = lambda: until_us + 1
        assert [one.rank for one in ward.cache.room.take_survey().candidates] == [0, 0]


def test_other_wards_priors_are_copied_for_a_device_that_sees_the_region(region: Region, hub: Hub) -> None:
    theirs = study("1.2.5", 3, patient_id="PAT", StudyDate="20240101")
    window = Window(theirs)
    with caching(region, hub, window=lambda ward: window) as ward:
        prepared(ward)
        ward.ledger.schedule([step(TODAY + timedelta(days=1))])
        ward.cache.prefetching.look()
        assert [stored_bytes(ward.archive, one) for one in theirs] == [one.dataset for one in theirs]
        origins = {one.head.provenance for one in ward.instances("1.2.5")}
        assert {(one.ward, one.issuer, one.device) for one in origins} == {
            (ward.node.ward.id, "SM", origin_device(GALLIERA))}  # fmt: skip
        assert set(window.asked) == {"CT1"} and set(priors(ward)) == {"1.2.5"}
        ward.settle()  # the region knows that this ward holds it too
        before = len(window.fetched)
        ward.ledger.schedule([step(TODAY + timedelta(days=1, hours=1))])
        ward.cache.prefetching.look()  # the worklist changed: what is here is not fetched again
        assert len(window.fetched) == before == 3


def test_a_device_that_may_not_look_there_gets_nothing_of_others(region: Region, hub: Hub) -> None:
    window = Window(study("1.2.5", 1, patient_id="PAT"))
    with caching(region, hub, window=lambda ward: window) as ward:
        prepared(ward, reach="ward")
        ward.ledger.schedule([step(TODAY + timedelta(days=1)),
                              step(TODAY + timedelta(days=1, hours=1), station="")])  # fmt: skip
        ward.cache.prefetching.look()
        assert window.asked == [] and priors(ward) == {}


def test_it_is_done_at_its_hour_once_a_day_and_again_when_the_region_was_away(
    region: Region, hub: Hub
) -> None:
    window = Window(study("1.2.5", 1, patient_id="PAT"))
    with caching(region, hub, window=lambda ward: window) as ward:
        prepared(ward, rule="at = '02:00'")
        ward.ledger.schedule([step(TODAY + timedelta(days=1))])
        prefetching = ward.cache.prefetching
        midnight = TODAY.replace(hour=0)

        def look(hour: int, minute: int = 0) -> int:
            prefetching._clock = lambda: int(midnight.replace(hour=hour, minute=minute).timestamp() * 1e6)
            prefetching.look()
            return len(window.fetched)

        assert look(1, 59) == 0
        window.fetch, fetch = _refused, window.fetch  # type: ignore[method-assign]
        assert look(2) == 0 and prefetching.last.reason == "the region does not answer"
        window.fetch = fetch  # type: ignore[method-assign]
        assert look(2, 1) == 1
        asked = len(window.asked)
        assert look(3) == 1 and len(window.asked) == asked


def _refused(principal: Principal, instance: StoredInstance) -> BinaryIO:
    raise Unavailable("the region does not answer")


def test_what_comes_damaged_is_not_kept(region: Region, hub: Hub) -> None:
    theirs = study("1.2.5", 2, patient_id="PAT")
    window = Window(theirs)
    window.studies["1.2.5"] = [replace(theirs[0], dataset=theirs[1].dataset), theirs[1]]
    listed = window.instances
    window.instances = lambda *asked: [  # type: ignore[method-assign]
        replace(one, digest=original.digest) for one, original in zip(listed(*asked), theirs, strict=True)]
    with caching(region, hub, window=lambda ward: window) as ward:
        prepared(ward)
        ward.ledger.schedule([step(TODAY + timedelta(days=1))])
        ward.cache.prefetching.look()
        assert ward.cache.prefetching.last.left == 1
        assert ward.archive.search(Query(Level.STUDY)) == [] and priors(ward) == {}


def test_without_room_priors_wait(region: Region, hub: Hub) -> None:
    window = Window(study("1.2.5", 2, patient_id="PAT"))
    with caching(region, hub, window=lambda ward: window) as ward:
        prepared(ward)
        ward.cache.room._room = lambda: Room(1 << 20, 40 << 20)
        ward.ledger.schedule([step(TODAY + timedelta(days=1))])
        ward.cache.prefetching.look()
        assert window.fetched == [] and "room" in ward.cache.prefetching.last.reason
