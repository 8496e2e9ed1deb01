"""The promise of packs, tried on a storage that loses unsynced pages, rots, fills up and fails its syncs:
every acknowledged instance is there, whole, exactly once; rot in what was promised is reported and costs
nothing else."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import random
import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from archive.errors import Corrupt, MissError, OutOfResources, SyncFailed
from archive.model import START, InstanceHead, Position, Provenance, Record, RecordKind
from archive.packs.logfiles import LogLimits
from archive.packs.packs import Packs
from archive.packs.recovery import Damage
from tests.archive.faulty_storage import FaultyStorage

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
# By its own thread the zeros would outlive the process that a crash ends here.
LIMITS = LogLimits(file_bytes_max=64 << 10, ahead_bytes=32 << 10, ahead_by_thread=False)


def head_of(number: int) -> InstanceHead:
    return InstanceHead(CT, f"1.2.3.{number}", EXPLICIT, Provenance("h/w", "ISSUER", "CT1", "CT1", number))


def payload_of(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


@dataclass
class Site:
    """An archive's packs through its crashes, and what was promised of them."""

    storage: FaultyStorage = field(default_factory=FaultyStorage)
    packs: Packs = field(init=False)
    acknowledged: dict[str, bytes] = field(default_factory=dict)
    written: dict[str, bytes] = field(default_factory=dict)
    waiting: list[tuple[str, bytes, object]] = field(default_factory=list)
    read_to: Position = START
    number: int = 0
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.packs = Packs.open(self.storage, limits=LIMITS)

    def append(self, size: int) -> None:
        self.number += 1
        self._append(self.number, size)

    def resend(self, choice: int) -> None:
        """A sender repeats what was never acknowledged; intake finds it missing and takes it."""
        found, _ = self.holdings()
        present = {uid for uid, _, _ in self.waiting} | set(found)
        missing = [uid for uid in self.sizes if uid not in present and uid not in self.acknowledged]
        if missing:
            self._append(*self.sizes[missing[choice % len(missing)]])

    def _append(self, number: int, size: int) -> None:
        head, data = head_of(number), payload_of(number, size)
        self.sizes[head.sop_instance_uid] = (number, size)
        digest = hashlib.sha256(data).digest()
        with contextlib.suppress(OutOfResources, SyncFailed):
            written = self.packs.append(RecordKind.INSTANCE, head, [data], len(data), digest)
            self.written[head.sop_instance_uid] = digest
            self.waiting.append((head.sop_instance_uid, digest, written))

    def append_image(self, size: int) -> None:
        self.number += 1
        head, data = head_of(self.number), payload_of(self.number, size)
        digest = hashlib.sha256(data).digest()
        image = self.packs.begin_image(head)
        image.room(size)[:] = data
        image.filled(size)
        with contextlib.suppress(OutOfResources, SyncFailed):
            written = self.packs.append_image(RecordKind.INSTANCE, head, image, digest)
            self.written[head.sop_instance_uid] = digest
            self.waiting.append((head.sop_instance_uid, digest, written))
        image.release()

    def append_own(self, size: int, *, meanwhile: int = 0) -> None:
        """A large instance; `meanwhile` others are appended while it streams, so that packs may change."""
        self.number += 1
        head, data = head_of(self.number), payload_of(self.number, size)
        digest = hashlib.sha256(data).digest()
        own = None
        try:
            own = self.packs.begin_own(head)
            for start in range(0, len(data), 5000):
                own.write(data[start : start + 5000])
                if meanwhile > 0 and start % 10_000 == 0:
                    meanwhile -= 1
                    self.append(9000)
                    self.acknowledge()
            own.seal()
            written = self.packs.append_own(RecordKind.INSTANCE, head, own)
        except (OutOfResources, SyncFailed):
            if own is not None:
                own.abort()
            return
        self.written[head.sop_instance_uid] = digest
        self.waiting.append((head.sop_instance_uid, digest, written))

    def leave_own(self, size: int) -> None:
        """A large instance whose process ends before anything refers to it: half written, or sealed."""
        self.number += 1
        with contextlib.suppress(OutOfResources, SyncFailed):
            own = self.packs.begin_own(head_of(self.number))
            own.write(payload_of(self.number, size))
            if size % 2:
                own.seal()

    def acknowledge(self) -> None:
        for uid, digest, written in self.waiting:
            with contextlib.suppress(SyncFailed, OutOfResources):
                self.packs.wait_durable(written)  # type: ignore[arg-type]
                self.acknowledged[uid] = digest
        self.waiting.clear()

    def reopen(self, storage: FaultyStorage) -> None:
        self.storage = storage
        self.waiting.clear()
        self.packs = Packs.open(storage, promised=self.read_to, limits=LIMITS)

    def index(self) -> None:
        """An index reads to the durable position, and remembers how far."""
        self.read_to = max(self.read_to, self.packs.log.durable)

    def holdings(self) -> tuple[dict[str, list[Record]], list[Damage]]:
        found: dict[str, list[Record]] = {}
        damages = []
        for item in self.packs.read(START, self.packs.log.durable):
            if isinstance(item, Damage):
                damages.append(item)
            else:
                found.setdefault(item.head.sop_instance_uid, []).append(item)
        return found, damages

    def check(self) -> None:
        found, damages = self.holdings()
        assert damages == []
        for uid, digest in self.acknowledged.items():
            assert [record.digest for record in found.get(uid, [])] == [digest]
        places = [record.end for records in found.values() for record in records]
        assert len(places) == len(set(places))
        sequences = [record.sequence for records in found.values() for record in records]
        assert len(sequences) == len(set(sequences))
        for uid, records in found.items():
            assert self.written[uid] == records[0].digest
            self.packs.verify(records[0].head, records[0].digest, records[0].location)


OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 14_000)),
    st.tuples(st.just("append"), st.sampled_from([100, 9000, 13_000])),
    st.tuples(st.just("append"), st.sampled_from([9000, 13_000])),
    st.tuples(st.just("resend"), st.integers(0, 3)),
    st.tuples(st.just("image"), st.integers(1, 30_000)),
    st.tuples(st.just("own"), st.integers(20_000, 60_000)),
    st.tuples(st.just("own meanwhile"), st.integers(20_000, 60_000)),
    st.tuples(st.just("own left"), st.integers(1, 60_000)),
    st.tuples(st.just("acknowledge"), st.just(0)),
    st.tuples(st.just("mark"), st.just(0)),
    st.tuples(st.just("index"), st.just(0)),
    st.tuples(st.just("close"), st.just(0)),
    st.tuples(st.just("kill"), st.just(0)),
    st.tuples(st.just("power loss"), st.integers(0, 1 << 30)),
    st.tuples(st.just("fail sync"), st.integers(1, 2)),
    st.tuples(st.just("write error"), st.sampled_from([errno.ENOSPC, errno.EIO])),
    st.tuples(st.just("disk full"), st.integers(0, 8000)),
    st.tuples(st.just("space returns"), st.just(0)),
)


def run(site: Site, operations: list[tuple[str, int]]) -> None:
    for operation, value in operations:
        if operation == "append":
            site.append(value)
        elif operation == "resend":
            site.resend(value)
        elif operation == "image":
            site.append_image(value)
        elif operation == "own":
            site.append_own(value)
        elif operation == "own meanwhile":
            site.append_own(value, meanwhile=value % 12)
        elif operation == "own left":
            site.leave_own(value)
        elif operation == "acknowledge":
            site.acknowledge()
        elif operation == "mark":
            with contextlib.suppress(MissError):
                site.packs.log.mark()
        elif operation == "index":
            site.index()
        elif operation == "close":
            site.storage.fail_syncs = site.storage.write_error = 0
            site.acknowledge()
            site.packs.close()
            site.reopen(site.storage.kill())
        elif operation == "kill":
            site.reopen(site.storage.kill())
        elif operation == "power loss":
            site.reopen(site.storage.power_loss(random.Random(value)))
        elif operation == "fail sync":
            site.storage.fail_syncs = value
        elif operation == "write error":
            site.storage.write_error = value
        elif operation == "disk full":
            site.storage.capacity = site.storage.capacity - site.storage.free_bytes() + value
        elif operation == "space returns":
            site.storage.capacity = 1 << 40


@settings(max_examples=600, deadline=None)
@given(st.lists(OPERATIONS, min_size=4, max_size=50), st.integers(0, 1 << 30))
def test_every_acknowledged_instance_survives(operations: list[tuple[str, int]], seed: int) -> None:
    site = Site()
    run(site, operations)
    site.reopen(site.storage.power_loss(random.Random(seed)))
    site.check()
    site.storage.capacity = 1 << 40
    site.resend(seed)
    site.append(3000)
    site.acknowledge()
    assert f"1.2.3.{site.number}" in site.acknowledged  # it goes on, whatever happened before
    site.reopen(site.storage.power_loss(random.Random(seed + 1)))
    site.check()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(1, 14_000), min_size=2, max_size=25),
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4),
    st.integers(0, 1 << 30),
    st.booleans(),
)
@example([1, 1, 317, 765, 765, 893, 893, 893, 4477, 4924, 5244, 13820, 13884], [(1.0, 1)], 0, False)  # full
def test_rot_in_what_was_promised_is_reported_and_costs_nothing_else(
    sizes: list[int], flips: list[tuple[float, int]], seed: int, power_loss: bool
) -> None:
    site = Site()
    for size in sizes:
        site.append(size)
        if size % 3:
            site.acknowledge()
    site.acknowledge()
    site.packs.log.mark()  # the idle moment: the last group is promised too
    found, _ = site.holdings()
    records = [record for each in found.values() for record in each]
    spans = [(r.location.pack, r.location.offset, r.location.offset + r.location.length) for r in records]
    struck: set[str] = set()
    for where, mask in flips:
        chosen = int(where * (len(records) - 1))
        pack, start, end = spans[chosen]
        # Anywhere in the payload, in the header before it, or in the trailer behind it.
        site.storage.flip(pack, max(start - 150, 0) + int(where * 997_003) % (end + 60 - (start - 150)), mask)
        struck.add(records[chosen].head.sop_instance_uid)
    site.reopen(site.storage.power_loss(random.Random(seed)) if power_loss else site.storage.kill())
    after, damages = site.holdings()
    for uid, digest in site.acknowledged.items():
        if uid not in struck:
            assert [record.digest for record in after[uid]] == [digest]
    lost = set(site.acknowledged) - set(after)
    assert lost <= struck
    assert not lost or damages
    named = {damage.head.sop_instance_uid for damage in damages if damage.head is not None}
    assert named <= struck
    for uid in lost:  # its place is named, by its head or by the stretch of the file
        record = found[uid][0]
        place = record.location.offset
        assert any(d.number == record.end.file and d.offset <= place < d.end for d in damages)
    assert not [name for name in site.storage.list("set-aside") if name.endswith(".cut")]
    for uid, entries in after.items():
        assert len(entries) == 1, uid


def test_rot_in_a_payload_is_seen_when_it_is_verified() -> None:
    site = Site()
    site.append(5000)
    site.acknowledge()
    found, _ = site.holdings()
    record = found["1.2.3.1"][0]
    site.storage.flip(record.location.pack, record.location.offset + 2000)
    with pytest.raises(Corrupt):
        site.packs.verify(record.head, record.digest, record.location)


def test_a_torn_tail_that_nobody_was_promised_is_cut_and_kept_aside() -> None:
    site = Site()
    site.append(5000)
    site.acknowledge()
    site.append(9000)
    chance = random.Random(0)
    after = site.storage.power_loss(chance)
    while True:  # until the coin drops a part of the second record and keeps another
        site.reopen(after)
        if any(name.endswith(".cut") for name in after.list("set-aside")):
            break
        site.acknowledge()
        site.append(9000)
        after = site.storage.power_loss(chance)
    site.check()


def test_what_was_cut_never_comes_back() -> None:
    """Two records of one size, never promised: the first torn, the second whole. The sender repeats the
    second alone, and it takes the first one's place: the old second must not stand behind it."""
    tried = 0
    for seed in range(400):
        site = Site()
        site.append(3000)
        site.acknowledge()
        site.append(9000)
        site.append(9000)
        site.reopen(site.storage.power_loss(random.Random(seed)))
        if set(site.holdings()[0]) != {"1.2.3.1"} or not site.storage.list("set-aside"):
            continue
        tried += 1
        site._append(3, 9000)
        site.acknowledge()
        site.reopen(site.storage.power_loss(random.Random(seed)))
        site.check()
    assert tried > 20


def test_a_failed_sync_fails_all_its_waiters_and_is_never_tried_again() -> None:
    site = Site()
    site.append(4000)
    site.append(4000)
    site.storage.fail_syncs = 1
    waiting = [written for _, _, written in site.waiting]
    for written in waiting:
        with pytest.raises(SyncFailed):
            site.packs.wait_durable(written)  # type: ignore[arg-type]
    with pytest.raises(SyncFailed):
        site.packs.wait_durable(waiting[0])  # type: ignore[arg-type]
    site.waiting.clear()
    site.append(4000)
    site.acknowledge()
    found, damages = site.holdings()
    assert list(found) == ["1.2.3.3"] and not damages  # what was abandoned is not served
    site.reopen(site.storage.power_loss(random.Random(1)))
    found, damages = site.holdings()
    assert list(found) == ["1.2.3.3"] and not damages


def test_records_left_by_a_failed_sync_are_written_again_before_they_are_built_upon() -> None:
    """After a failed fdatasync the kernel holds the lost pages for clean: a process that starts again reads
    them whole from the cache, and a later sync that succeeds would not write them."""
    site = Site()
    site.append(9000)
    site.storage.fail_syncs = 1
    with pytest.raises(SyncFailed):
        site.packs.wait_durable(site.waiting[0][2])  # type: ignore[arg-type]
    site.reopen(site.storage.kill())
    found, _ = site.holdings()
    site.append(3000)
    site.acknowledge()
    for seed in range(20):
        site.reopen(site.storage.power_loss(random.Random(seed)))
        after, damages = site.holdings()
        assert not damages
        assert set(after) == {*found, "1.2.3.2"}


@pytest.mark.parametrize("failures", [1, 2])
def test_what_a_crash_left_is_found_only_when_the_disk_confirms_it(failures: int) -> None:
    """Whoever finds a record takes it for durable: the region gives a receipt for it."""
    site = Site()
    site.append(9000)
    after = site.storage.kill()
    after.fail_syncs = failures
    site.reopen(after)
    found, _ = site.holdings()
    assert set(found) == {"1.2.3.1"}
    for seed in range(20):
        again = Site(site.storage.power_loss(random.Random(seed)))
        assert set(again.holdings()[0]) == set(found)


def test_a_log_that_the_disk_does_not_confirm_stays_shut_and_loses_nothing() -> None:
    site = Site()
    site.append(9000)
    after = site.storage.kill()
    after.fail_syncs = 3
    with pytest.raises(SyncFailed):
        Packs.open(after, limits=LIMITS)
    site.reopen(after)  # the disk is well again
    assert set(site.holdings()[0]) == {"1.2.3.1"}
    for seed in range(20):
        assert set(Site(site.storage.power_loss(random.Random(seed))).holdings()[0]) == {"1.2.3.1"}


def test_a_file_whose_maker_ended_before_it_synced_the_directory_is_named_for_good() -> None:
    """kill -9 between the header's sync and the directory's, then a restart, then the power: the file that
    was found by its name alone has to be there again with what was acknowledged in it."""
    class Killed(BaseException):
        pass

    class Dying(FaultyStorage):
        def sync_directory(self, folder: str) -> None:
            raise Killed

    dying = Dying()
    with pytest.raises(Killed):
        Packs.open(dying, limits=LIMITS)
    site = Site(FaultyStorage.kill(dying))
    site.append(3000)
    site.acknowledge()
    for seed in range(20):
        after = Site(site.storage.power_loss(random.Random(seed)))
        found, damages = after.holdings()
        assert not damages and set(found) == {"1.2.3.1"}


def test_a_full_disk_refuses_and_recovers_by_itself() -> None:
    site = Site()
    site.append(4000)
    site.acknowledge()
    site.storage.capacity -= site.storage.free_bytes()
    refused = 0
    for number in range(100, 130):
        data = payload_of(number, 4000)
        try:
            site.packs.append(
                RecordKind.INSTANCE, head_of(number), [data], 4000, hashlib.sha256(data).digest()
            )
        except OutOfResources:
            refused += 1
    assert refused
    assert site.storage.size("packs/00000001.pack") == site.packs.log.end.offset  # nothing half stored
    site.storage.capacity = 1 << 40
    site.number = 200
    site.append(4000)
    site.acknowledge()
    assert "1.2.3.201" in site.acknowledged
    found, damages = site.holdings()
    assert "1.2.3.201" in found and not damages


def test_an_older_copy_of_the_log_never_uses_a_position_again() -> None:
    site = Site()
    older = site.storage.power_loss(random.Random(1))
    for _ in range(30):
        site.append(9000)
        site.acknowledge()
    site.index()
    site.reopen(older)
    assert site.packs.log.end >= site.read_to
    site.append(1000)
    site.acknowledge()
    assert site.packs.log.durable > site.read_to


def test_an_own_pack_without_a_reference_is_kept_aside() -> None:
    site = Site()
    own = site.packs.begin_own(head_of(1))
    own.write(b"x" * 30_000)
    own.seal()
    site.append_own(30_000)
    site.acknowledge()
    site.reopen(site.storage.kill())
    assert [name for name in site.storage.list("set-aside") if name.startswith("set-aside/large-")]
    site.check()
    assert len(site.storage.list("large")) == 1


def test_a_damaged_file_header_does_not_cost_the_records_behind_it() -> None:
    site = Site()
    site.append(4000)
    site.acknowledge()
    site.packs.log.mark()
    site.storage.flip("packs/00000001.pack", 20)
    site.reopen(site.storage.kill())
    site.check()
    assert site.holdings()[0]


def test_zeros_ahead_without_a_thread_cost_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    packs = Packs.open(FaultyStorage(), limits=LogLimits())
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_more)
        for number in range(3):
            data = payload_of(number, 100)
            written = packs.append(
                RecordKind.INSTANCE, head_of(number), [data], 100, hashlib.sha256(data).digest()
            )
            packs.wait_durable(written)
    packs.close()
    assert packs.log.next_sequence == 5  # three, and the mark that promises them
