"""The cache of a ward over a real hub: a ward that stores more than its disk holds goes on storing, gives up
only what the region has and protects, keeps what was pinned, and gets back what was wanted."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from archive.errors import NotFound, Unavailable
from archive.ledger import DeclaredBackup, Pin
from archive.ledger.keeping import PERSON
from archive.space.eviction import EvictionReport
from federation import laying_down, protection
from federation.bringing_orders import BRING
from federation.hub import Hub
from node.cache import bringing, room
from node.cache.bringing import NOT_HERE
from node.cache.cache import NOTE
from tests.datasets import Instance
from tests.federation.regions import Region, make_region
from tests.federation.wards import stored_bytes
from tests.node.caching import MB, CachingWard, caching, protecting, study
from tests.waiting import wait_for

WAIT_S = 20.0


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that a test need not sit through; and what moves on by itself moves in microseconds."""
    monkeypatch.setattr(bringing, "QUIET_S", 0.05)
    monkeypatch.setattr(bringing, "AWAY_S", 0.1)
    monkeypatch.setattr(room, "SURVEY_AGAIN_S", 0.1)
    monkeypatch.setattr(laying_down, "LOOK_S", 0.05)
    monkeypatch.setattr(protection, "ASK_S", 0.05)
    monkeypatch.setattr(protection, "_SECOND_US", 1)


@pytest.fixture
def region(tmp_path: Path) -> Region:
    return make_region(tmp_path)


@pytest.fixture
def hub(region: Region) -> Iterator[Hub]:
    with protecting(region) as hub:
        yield hub


def protected(ward: CachingWard) -> None:
    """What was stored until now has its receipts, and they count."""
    ward.settle()
    newest = max(
        place.receipt_us for match in ward.archive.index.cached.studies(0)
        for one in ward.instances(match.study_uid)
        for place in ward.archive.index.places([one.head.sop_instance_uid]).values()
    )  # fmt: skip
    uplink = ward.node.uplink
    assert uplink is not None
    wait_for(lambda: uplink.policy is not None and uplink.policy.protected_to_us >= newest, "it counts")


def sent(instances: list[Instance]) -> list[bytes]:
    return [one.dataset for one in instances]


def give_up(ward: CachingWard, count: int = 100) -> None:
    """The first studies that may go, go."""
    ward.cache.room._evict(ward.cache.room.take_survey().candidates[:count], EvictionReport())


def note(ward: CachingWard) -> dict[str, object]:
    """How the cache says that it stands."""
    found = ward.ledger.cache_note(NOTE)
    return {} if found is None else json.loads(found[0])


def test_a_ward_that_stores_more_than_its_disk_goes_on_storing(region: Region, hub: Hub) -> None:
    studies = [study(f"1.2.{number}", 5) for number in range(1, 25)]  # 240 MB
    with caching(region, hub, 80 * MB) as ward:
        ward.attach()
        ward.cache.start()
        refused = sum(ward.take_as_long_as_it_takes(one) for instances in studies for one in instances)
        ward.settle()
        assert sum(ward.evicted(f"1.2.{number}") for number in range(1, 25)) >= 60
        assert ward.free_bytes() > 4 * MB
        assert ward.evicted("1.2.24") == 0  # the newest is here
        wait_for(lambda: note(ward).get("last_eviction_us"), "it says what it gave up")
        # nothing is lost: what went comes back as it was sent
        for number in (1, 2):
            assert ward.cache.bringing.bring(f"1.2.{number}", urgent=True).missing == 0
            found = [stored_bytes(ward.archive, one) for one in studies[number - 1]]
            assert found == sent(studies[number - 1])
        assert refused < 30  # room is made before intake has to refuse, but for a burst


def test_without_the_region_nothing_goes_and_the_ward_says_why(region: Region, hub: Hub) -> None:
    with caching(region, hub, 40 * MB) as ward:
        ward.cache.start()
        ward.node.take([one for number in range(1, 4) for one in study(f"1.2.{number}", 5)])
        wait_for(lambda: note(ward).get("why_not") == room.NOTHING_LAID_DOWN, "it says why")
        assert sum(ward.evicted(f"1.2.{number}") for number in range(1, 4)) == 0
        ward.attach()
        wait_for(lambda: ward.free_bytes() >= 10 * MB, "with a line it makes room")
        assert ward.evicted("1.2.1", "1.2.2", "1.2.3") > 0


def test_nothing_goes_while_it_is_held(region: Region, hub: Hub) -> None:
    with caching(region, hub, 40 * MB) as ward:
        ward.is_held = True
        ward.attach()
        ward.node.take([one for number in range(1, 4) for one in study(f"1.2.{number}", 5)])
        protected(ward)
        ward.cache.start()
        wait_for(lambda: note(ward).get("why_not") == room.HELD, "it says why")
        assert sum(ward.evicted(f"1.2.{number}") for number in range(1, 4)) == 0
        ward.is_held = False
        wait_for(lambda: ward.evicted("1.2.1") == 5, "it goes on")


def test_receipts_count_from_the_last_backup_on(region: Region) -> None:
    with protecting(region, by="backup") as hub, caching(region, hub, 40 * MB) as ward:
        ward.attach()
        ward.node.take([one for number in range(1, 3) for one in study(f"1.2.{number}", 5)])
        ward.settle()
        ward.cache.start()
        ward.node.take(study("1.2.3", 5))
        wait_for(lambda: note(ward).get("why_not") == room.NOTHING_PROTECTED, "it says why")
        uids = [one.head.sop_instance_uid for uid in ("1.2.1", "1.2.2") for one in ward.instances(uid)]
        first = min(one.receipt_us for one in ward.archive.index.standings(uids).values())
        region.ledger.declare_backup(DeclaredBackup(first - 1, "eva", 1))  # began before its receipts
        wait_for(lambda: note(ward).get("why_not") == room.NO_RECEIPTS, "an older backup frees nothing")
        assert ward.evicted("1.2.1", "1.2.2", "1.2.3") == 0
        region.ledger.declare_backup(DeclaredBackup(time.time_ns() // 1000, "eva", 1))
        wait_for(lambda: ward.evicted("1.2.1") == 5, "what the backup has may go")


def test_young_receipts_do_not_count(region: Region) -> None:
    with protecting(region, hours=24.0) as hub, caching(region, hub, 40 * MB) as ward:
        ward.attach()
        ward.node.take([one for number in range(1, 4) for one in study(f"1.2.{number}", 5)])
        ward.settle()
        ward.cache.start()
        wait_for(lambda: note(ward).get("why_not") == room.NO_RECEIPTS, "it says why")
        assert ward.evicted("1.2.1", "1.2.2", "1.2.3") == 0


def test_what_is_pinned_stays_and_what_is_used_stays_longer(region: Region, hub: Hub) -> None:
    with caching(region, hub, 80 * MB) as ward:
        ward.attach()
        for number in range(1, 5):
            ward.node.take(study(f"1.2.{number}", 5))
        protected(ward)
        ward.ledger.pin_study(Pin("1.2.1", PERSON, 0, "eva", 1))
        ward.cache.read(ward.instances("1.2.2")[0])  # retrieved by a device
        ward.cache.start()
        ward.node.take(study("1.2.5", 5))
        ward.node.take(study("1.2.6", 5))
        wait_for(lambda: ward.evicted("1.2.3") == 5, "the oldest of the others goes")
        wait_for(lambda: ward.free_bytes() >= 80 * MB * 25 // 100, "there is room")
        assert ward.evicted("1.2.1") == 0 and ward.evicted("1.2.2") == 0


def test_everything_pinned_is_said(region: Region, hub: Hub) -> None:
    with caching(region, hub, 40 * MB) as ward:
        ward.attach()
        for number in range(1, 4):
            ward.node.take(study(f"1.2.{number}", 5))
            ward.ledger.pin_study(Pin(f"1.2.{number}", PERSON, 0, "eva", 1))
        protected(ward)
        ward.cache.start()
        wait_for(lambda: note(ward).get("why_not") == room.ALL_PINNED, "it says why")
        assert ward.evicted("1.2.1", "1.2.2", "1.2.3") == 0


def test_what_nobody_wants_goes_by_age_though_there_is_room(region: Region, hub: Hub) -> None:
    day_us = 86_400 * 1_000_000
    with caching(region, hub, unused_days=30.0) as ward:
        ward.attach()
        now_us = time.time_ns() // 1000
        ward.node.take(study("1.2.1"), at_us=now_us - 40 * day_us)
        ward.node.take(study("1.2.2"), at_us=now_us - 40 * day_us)
        ward.node.take(study("1.2.3"), at_us=now_us - 20 * day_us)
        ward.ledger.note_uses({"1.2.2": now_us - day_us})
        protected(ward)
        ward.cache.start()
        wait_for(lambda: ward.evicted("1.2.1") == 3, "what is too old goes")
        assert ward.evicted("1.2.2", "1.2.3") == 0


def test_what_a_reader_fetched_is_kept_again_where_there_is_room(region: Region, hub: Hub) -> None:
    with caching(region, hub) as ward:
        ward.attach()
        instances = study("1.2.1", 4)
        ward.node.take(instances)
        protected(ward)
        give_up(ward)
        assert ward.evicted("1.2.1") == 4
        ward.cache.start()
        ward.cache.read(ward.instances("1.2.1")[0])  # one of its images
        wait_for(lambda: ward.evicted("1.2.1") == 0, "the whole study is kept again")
        assert [stored_bytes(ward.archive, one) for one in instances] == sent(instances)
        assert ward.node.pending == 0


def test_without_room_what_was_fetched_is_not_kept(region: Region, hub: Hub) -> None:
    with caching(region, hub, 40 * MB, free_percent_low=0.0, free_percent_high=70.0) as ward:
        ward.attach()
        ward.node.take(study("1.2.1", 4))
        ward.node.take(study("1.2.2", 4))
        protected(ward)
        give_up(ward, 1)
        ward.cache.bringing.start()
        ward.cache.read(ward.instances("1.2.1")[0])
        wait_for(lambda: ward.cache.bringing.waiting == 0, "it was looked at")
        assert ward.evicted("1.2.1") == 4
        ward.cache.stop()


def test_a_study_is_fetched_on_demand_and_it_is_said_why_not(region: Region, hub: Hub) -> None:
    with caching(region, hub) as ward:
        order = ward.cache.handlers()[BRING]
        ward.attach()
        instances = study("1.2.1")
        ward.node.take(instances)
        protected(ward)
        assert order({"study": "1.2.1"}, "eva") == NOT_HERE
        with pytest.raises(NotFound):
            order({"study": "1.2.9"}, "eva")
        give_up(ward)
        hub.stop()
        wait_for(lambda: not ward.restoring.is_ready, "the line is gone")
        with pytest.raises(Unavailable, match="can't be reached"):
            order({"study": "1.2.1"}, "eva")
        assert ward.evicted("1.2.1") == 3
        again = Hub(hub.settings)
        again.start()
        try:
            wait_for(lambda: ward.restoring.is_ready, "the line is back")
            assert order({"study": "1.2.1"}, "eva") == "3 instances are here again"
            assert [stored_bytes(ward.archive, one) for one in instances] == sent(instances)
        finally:
            again.stop()


def test_a_study_that_is_here_before_it_is_waited_for_holds_nobody_up(
    region: Region, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that brings it may be done before who asked goes on."""
    with caching(region, hub) as ward:
        ward.attach()
        ward.node.take(study("1.2.1"))
        protected(ward)

        def at_once(bring: Callable[..., object], *args: object, **options: object) -> Future[object]:
            done: Future[object] = Future()
            done.set_result(bring(*args, **options))
            return done

        monkeypatch.setattr(ward.cache.bringing._pool, "submit", at_once)
        answers: list[str] = []
        order = ward.cache.handlers()[BRING]
        asking = threading.Thread(
            target=lambda: answers.append(order({"study": "1.2.1"}, "eva")), daemon=True
        )
        asking.start()
        asking.join(30)
        assert answers == [NOT_HERE]


def test_uses_are_kept_across_a_restart_in_one_write(region: Region, hub: Hub) -> None:
    with caching(region, hub) as ward:
        ward.node.take(study("1.2.1"))
        (first, *_) = ward.instances("1.2.1")
        for _ in range(100):
            ward.cache.read(first)
        assert ward.ledger.uses_of(["1.2.1"]) == {}
        ward.cache.start()
        ward.cache.stop()
        assert set(ward.ledger.uses_of(["1.2.1", "1.2.2"])) == {"1.2.1"}
