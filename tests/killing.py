"""A node that is killed again and again. Each round starts the product's own archive and DIMSE server in a
process of its own, stores over several associations, and ends it with SIGKILL: at a random moment, or by the
process itself just before, after or in the middle of a chosen operation on its disk or its index. The next
round's start is the recovery; it may be killed as well.

It knows nothing of how packs are written: it counts operations of the storage's own interface.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import archive.archive
from archive.archive import Archive, ArchiveSettings
from archive.index.index import Index
from archive.model import START, Record
from archive.packs.recovery import Damage
from archive.packs.storage import FileStorage
from archive.rebuild import rebuild
from node.dimse import messages
from node.dimse.errors import AssociationEnded
from node.dimse.pdu import AssociateRequest, PduType, ProposedContext
from node.dimse.requestor import Peer, Requestor
from tests.datasets import CT, EXPLICIT, make_instance
from tests.forked import PATIENT, begin, serve
from tests.node.serving import AE_TITLE, Raw, data

SENDERS = 2
WINDOW = 4
FRAGMENT_BYTES = 60_000
ROUND_S_MAX = 0.25      # of storing, unless the aim is hit before
SMALL_BYTES_MAX = 48 << 10
LARGE_SHARE = 0.06
FORGOTTEN_SHARE = 0.1   # of what was not acknowledged: its sender never comes back


# ---------------------------------------------------------------- the process that is killed


@dataclass(frozen=True, slots=True)
class Aim:
    """Die at the `countdown`-th `operation` on an object whose name begins with `prefix`. "torn" writes the
    first half of it."""

    operation: str
    prefix: str
    countdown: int
    moment: str = "after"

    def __str__(self) -> str:
        return f"{self.moment} {self.operation} {self.prefix}"


class Trigger:
    """Counts what is aimed at, over all threads."""

    def __init__(self, aim: Aim) -> None:
        self._aim = aim
        self._left = aim.countdown
        self._lock = threading.Lock()

    def watch(self, operation: str, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        aim = self._aim
        if operation != aim.operation or not name.startswith(aim.prefix):
            return call

        def watched(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self._left -= 1
                hit = self._left == 0
            if not hit:
                return call(*arguments, **options)
            if aim.moment == "after":
                call(*arguments, **options)
            elif aim.moment == "torn":
                octets = b"".join(bytes(view) for view in arguments[0])
                call([octets[: len(octets) // 2]], arguments[1])  # not past the page cache: it is no page
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("not reached")

        return watched


class AimedFile:
    """A file whose operations are counted."""

    def __init__(self, file: Any, trigger: Trigger) -> None:
        self._file, self._trigger = file, trigger

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._file, name)
        return self._trigger.watch(name, self._file.name, attribute) if callable(attribute) else attribute


class AimedStorage:
    """A storage whose operations are counted."""

    def __init__(self, storage: FileStorage, trigger: Trigger) -> None:
        self._storage, self._trigger = storage, trigger

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._storage, name)
        if not callable(attribute):
            return attribute

        def call(*arguments: Any, **options: Any) -> Any:
            first = arguments[0] if arguments and isinstance(arguments[0], str) else ""
            found = self._trigger.watch(name, first, attribute)(*arguments, **options)
            return AimedFile(found, self._trigger) if name in ("create", "open") else found

        return call


def serve_aimed(folder: Path, options: dict[str, Any], aim: Aim | None, says: Connection) -> None:
    """What a round's process runs until it is killed."""
    if aim is not None:
        trigger = Trigger(aim)
        archive.archive.FileStorage = lambda root: AimedStorage(FileStorage(root), trigger)  # type: ignore
        for name in ("apply", "apply_facts"):
            setattr(Index, name, trigger.watch(name, "index", getattr(Index, name)))
    serve(folder, options, says)


# ---------------------------------------------------------------- what is sent


PLACES = {kind: f"1.2.826.{kind}.1000000000" for kind in (1, 2, 3)}  # SOP instance, study, series


@lru_cache(maxsize=1)
def _template() -> bytes:
    return make_instance(sop_uid=PLACES[1], study_uid=PLACES[2], series_uid=PLACES[3], rows=0).dataset


def uid_of(kind: int, number: int) -> str:
    return f"1.2.826.{kind}.{1_000_000_000 + number}"


def dataset_of(number: int) -> bytes:
    """The data set that goes with a number, the same whenever it is asked for."""
    chance = random.Random(number)
    large = chance.random() < LARGE_SHARE
    size = chance.randrange(SMALL_BYTES_MAX, 10 * SMALL_BYTES_MAX) if large else chance.randrange(0, 20_000)
    padding = chance.randbytes(size & ~1)
    head = _template()
    for kind, of in ((1, number), (2, number // 40), (3, number // 20)):
        head = head.replace(PLACES[kind].encode(), uid_of(kind, of).encode())
    return head + struct.pack("<HH2sHI", 0xFFFC, 0xFFFC, b"OB", 0, len(padding)) + padding


# ---------------------------------------------------------------- the rounds


@dataclass
class Site:
    """One state through its kills: what was sent, and what of it was promised."""

    folder: Path
    seed: int
    digests: dict[str, bytes] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)
    unchecked: list[int] = field(default_factory=list)
    unanswered: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    _next: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _reader: Archive | None = None

    @property
    def settings(self) -> ArchiveSettings:
        return ArchiveSettings(state=self.folder / "state", free_bytes_min=0)

    def round(self, number: int, aim: Aim | None = None) -> None:
        """Start, check what the last rounds promised, store, kill."""
        chance = random.Random(f"{self.seed}/{number}")
        aim = aim or choose_aim(chance)
        options = {
            "pack_bytes_max": chance.choice([256 << 10, 1 << 20, 64 << 20]),
            # What is larger lies in a pack of its own; or among the others, when the bound is above it.
            "small_object_bytes_max": chance.choice([SMALL_BYTES_MAX, 1 << 20]),
        }
        process, hears, port = begin(serve_aimed, self.folder, options, aim)
        hit = aim is not None
        try:
            if port is not None:
                if chance.random() < 0.7:
                    self.check_promised()
                hit = self._store_until_killed(port, process, aim, chance)
        finally:
            process.kill()
            process.join()
            hears.close()
        assert process.exitcode == -signal.SIGKILL, f"the node ended by itself: {process.exitcode}"
        moment = str(aim) if hit else "at a random moment"
        self.kills[f"as it started, {moment}" if port is None else moment] += 1
        assert self.wrong == []

    def _store_until_killed(self, port: int, process: Any, aim: Aim | None, chance: random.Random) -> bool:
        """Whether it died where it was aimed at."""
        over = threading.Event()
        senders = [threading.Thread(target=self._send, args=(port, over)) for _ in range(SENDERS)]
        senders.append(threading.Thread(target=self._send_ahead, args=(port, over)))
        for sender in senders:
            sender.start()
        if aim is None:
            time.sleep(chance.uniform(0.0, ROUND_S_MAX))
        else:
            process.join(ROUND_S_MAX + 0.5)
        hit = not process.is_alive()
        process.kill()
        over.set()
        for sender in senders:
            sender.join(PATIENT.message_timeout_s * 2)
            assert not sender.is_alive()
        return hit

    def _send(self, port: int, over: threading.Event) -> None:
        """Sends until the connection breaks."""
        peer, proposed = Peer("127.0.0.1", port, AE_TITLE), [ProposedContext(1, CT, (EXPLICIT,))]
        with (
            suppress(AssociationEnded),
            Requestor.connect(peer, "CT1", proposed, limits=PATIENT) as requestor,
        ):
            context = requestor.context(CT, EXPLICIT)
            assert context is not None
            while not over.is_set():
                number, dataset = self._take()
                try:
                    status = requestor.store(context, uid_of(1, number), [dataset])
                except AssociationEnded:
                    self._unanswered([number])
                    raise
                self._answered(number, status)

    def _send_ahead(self, port: int, over: threading.Event) -> None:
        """As `_send`, within an asynchronous operations window: WINDOW requests wait for their answers."""
        asked: dict[int, int] = {}  # message IDs, and the numbers of what was sent
        proposed = (ProposedContext(1, CT, (EXPLICIT,)),)
        request = AssociateRequest(AE_TITLE, "CT1", proposed, 16384, asynchronous_window=(WINDOW, 1))
        message_id = 0
        # The node dies in the middle of whatever it says.
        with suppress(OSError, AssertionError), Raw(port, timeout_s=PATIENT.message_timeout_s) as raw:
            raw.associate(request)
            while not over.is_set():
                while len(asked) < WINDOW:
                    number, dataset = self._take()
                    message_id = message_id % 0xFFFF + 1
                    asked[message_id] = number
                    raw.send(data(1, 3, messages.store_request(message_id, CT, uid_of(1, number))))
                    for at in range(0, len(dataset), FRAGMENT_BYTES):
                        last = 2 if at + FRAGMENT_BYTES >= len(dataset) else 0
                        raw.send(data(1, last, dataset[at : at + FRAGMENT_BYTES]))
                kind, body = raw.receive()
                if kind != PduType.P_DATA_TF:
                    break
                answer = messages.parse(body[6:])
                self._answered(asked.pop(answer.short(messages.MESSAGE_ID_RESPONDED_TO, 0)), answer.status)
        self._unanswered(asked.values())

    def _answered(self, number: int, status: int) -> None:
        with self._lock:
            if status == 0:
                self.acknowledged.add(uid_of(1, number))
                self.unchecked.append(number)
            else:
                self.wrong.append(f"{status:04X} for {number}")

    def _unanswered(self, numbers: Iterable[int]) -> None:
        """Most of them are sent again in a later round."""
        with self._lock:
            self.unanswered += [n for n in numbers if random.Random(n).random() > FORGOTTEN_SHARE]

    def _take(self) -> tuple[int, bytes]:
        with self._lock:
            if self.unanswered:
                number = self.unanswered.pop(0)
            else:
                self._next += 1
                number = self._next
        dataset = dataset_of(number)
        self.digests[uid_of(1, number)] = hashlib.sha256(dataset).digest()
        return number, dataset

    # --- checking

    def check_promised(self) -> None:
        """What was acknowledged since the last check is found and hash-equal, as another process reads it
        while the node runs; and what was not answered is there whole or not at all."""
        if self._reader is None:
            self._reader = Archive.open(self.settings, outbox=True, read_only=True)
        for number in self.unchecked:
            assert self._is_whole(self._reader, number), f"{number} was acknowledged and is not there"
        for number in self.unanswered:
            self._is_whole(self._reader, number)
        self.checked += len(self.unchecked)
        self.unchecked.clear()

    def _is_whole(self, reader: Archive, number: int) -> bool:
        found = reader.instances(uid_of(2, number // 40), uid_of(3, number // 20), uid_of(1, number))
        assert len(found) <= 1
        for one in found:
            assert one.digest == self.digests[uid_of(1, number)], number
            reader.verify(one)
        return bool(found)

    def finish(self) -> None:
        """Everything at once: each record whole and once, nothing that was not sent, no name left over, and
        the index is what a rebuild makes."""
        if self._reader is not None:
            self._reader.close()
        with Archive.open(self.settings, outbox=True) as opened:
            items = list(opened.packs.read(START, opened.packs.log.durable))
            assert not [item for item in items if isinstance(item, Damage)]
            records = {item.head.sop_instance_uid: item for item in items if isinstance(item, Record)}
            assert len(records) == len(items), "an instance is there twice"
            assert self.acknowledged <= records.keys()
            for uid, record in records.items():
                assert record.digest == self.digests[uid]
                opened.packs.verify(record.head, record.digest, record.location)
            own = {r.location.pack for r in records.values() if r.location.pack.startswith("large/")}
            assert set(opened.packs.storage.list("large")) == own
            self.check_tail(opened)
            opened.wait_indexed()
            assert opened.index.totals().instances == len(records)
            assert opened.index.totals().conflicts == 0
            dump = opened.index.dump()
        rebuild(self.settings, outbox=True)
        with Archive.open(self.settings, outbox=True) as opened:
            assert opened.index.dump() == dump

    def check_tail(self, opened: Archive) -> None:
        """Behind the last record there is nothing that was ever written."""
        end = opened.packs.log.end
        name = opened.packs.log.layout.name_of(end.file)
        assert not any(self.folder.joinpath("state", name).read_bytes()[end.offset :])


def choose_aim(chance: random.Random) -> Aim | None:
    """Half of the rounds die anywhere, a tenth as they start, the others at a step of the write path."""
    kind = chance.random()
    if kind < 0.45:
        return None
    if kind < 0.6:  # early: recovery writes, cuts, renames and syncs too
        operation, prefix = chance.choice([
            ("pwritev", ""), ("fdatasync", ""), ("truncate", ""), ("rename", ""), ("sync_directory", ""),
            ("create", "set-aside/"), ("fdatasync", "set-aside/"), ("fdatasync", "packs/"),
            ("apply", "index"),
        ])
        return Aim(operation, prefix, chance.randint(1, 3), chance.choice(["before", "after"]))
    operation, prefix, often = chance.choice(list(_steps()))
    moments = ["before", "after", "torn"] if operation == "pwritev" else ["before", "after"]
    return Aim(operation, prefix, chance.randint(1, often), chance.choice(moments))


def _steps() -> Iterator[tuple[str, str, int]]:
    """The write path's steps, and how often each comes in a round."""
    yield "pwritev", "packs/", 80
    yield "pwritev", "packs/", 80
    yield "fdatasync", "packs/", 40
    yield "fdatasync", "packs/", 40
    yield "truncate", "packs/", 3      # sealing
    yield "create", "packs/", 3        # the next pack
    yield "sync_directory", "packs", 3
    yield "create", "large/", 4
    yield "pwritev", "large/", 12
    yield "fdatasync", "large/", 4
    yield "sync_directory", "large", 4
    yield "rename", "large/", 4
    yield "apply", "index", 6
