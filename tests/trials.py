"""A region under load that is broken while it works: a node, its hubs, modalities that never stop storing,
and what has to be true afterwards. With a link (`bench/link.py`) node and modalities run at its far end, the
hubs at the near one.

What is checked at the end, of what was acknowledged: the region has each once and digest-equal, as read from
its packs; the node's receipts name exactly that; and whenever the region said that it had everything up to a
time, it had everything that was acknowledged before that time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from archive.archive import Archive, ArchiveSettings
from archive.errors import MissError
from archive.ledger import Ledger
from archive.model import START, FactKind, Record
from bench.link import Link
from miss import configuration
from miss.load import instances
from miss.load.instances import Instance, Numbered
from miss.local import HOST, LocalRegion, Ports
from miss.processes import Child, free_ports, listening, wait_until
from node.dimse import contexts
from node.dimse.association import Limits
from node.dimse.errors import AssociationEnded
from node.dimse.requestor import Peer, Requestor
from tests.cluster import CALLING, RADIOLOGY

T = TypeVar("T")

START_S_MAX = 90.0
# How much later than an answer the node's clock may be read for a report, that it counts as "before".
SKEW_US = 2_000
_CLONE_NEWNET = 0x40000000
_LIMITS = Limits(message_timeout_s=60.0)


def asked(name: str, default: str) -> str:
    """What the environment asks of a trial. It is taken out: the product refuses settings that it has not."""
    return os.environ.pop(name, default)


@dataclass(frozen=True, slots=True)
class Mix:
    """What the modalities send: a CT slice of 0.5 MB for every `ct_each`, a mammogram of 30 MB for every
    `large_each`, and the rest are of 8 KB. 0 is none."""

    ct_each: int = 10
    large_each: int = 0

    def corpora(self) -> list[tuple[int, Numbered]]:
        found: list[tuple[int, Numbered]] = [(1, instances.small())]
        if self.ct_each:
            found.insert(0, (self.ct_each, instances.ct()))
        if self.large_each:
            found.insert(0, (self.large_each, instances.mammogram()))
        return found


class Load:
    """What modalities send, and what was promised of it. What had no answer is sent again."""

    def __init__(self, mix: Mix) -> None:
        self._corpora = mix.corpora()
        self._lock = threading.Lock()
        self._next = 0
        self._unanswered: list[int] = []
        self.acknowledged: dict[int, int] = {}  # a number, and when, in microseconds
        self.wrong: list[str] = []
        self.bytes = 0

    def instance(self, number: int) -> Instance:
        corpus = next(corpus for each, corpus in self._corpora if number % each == each - 1)
        return corpus.instance(number)

    def corpus_classes(self) -> list[tuple[str, str]]:
        return [(corpus.sop_class_uid, corpus.transfer_syntax_uid) for _, corpus in self._corpora]

    def take(self) -> int:
        with self._lock:
            if self._unanswered:
                return self._unanswered.pop()
            self._next += 1
            return self._next - 1

    def answered(self, number: int, status: int, size: int) -> None:
        with self._lock:
            if status == 0:
                self.acknowledged[number] = time.time_ns() // 1000
                self.bytes += size
            else:
                self.wrong.append(f"{status:04X} for {number}")

    def unanswered(self, number: int) -> None:
        with self._lock:
            self._unanswered.append(number)

    @property
    def left(self) -> int:
        """What no modality got an answer for."""
        with self._lock:
            return len(self._unanswered)


class Modality(threading.Thread):
    """Stores one after the other over one association, and opens another when it breaks. `over` ends it: at
    once, but for what had no answer before."""

    def __init__(self, load: Load, peer: Callable[[], Peer], over: threading.Event, pause_s: float,
                 namespace: str) -> None:
        super().__init__(name="modality", daemon=True)
        self._load, self._peer, self._over = load, peer, over
        self._pause_s, self._namespace = pause_s, namespace
        self.failed: BaseException | None = None

    @property
    def _wanted(self) -> bool:
        return not self._over.is_set() or self._load.left > 0

    def run(self) -> None:
        try:
            if self._namespace:
                enter(self._namespace)
            proposed = contexts.plan(self._load.corpus_classes())
            while self._wanted:
                with suppress(AssociationEnded):
                    with Requestor.connect(self._peer(), CALLING, proposed[0], limits=_LIMITS) as requestor:
                        self._send(requestor)
                    continue
                self._pause(0.05)
        except BaseException as error:
            self.failed = error
            raise

    def _send(self, requestor: Requestor) -> None:
        while self._wanted:
            number = self._load.take()
            instance = self._load.instance(number)
            context = requestor.context(instance.sop_class_uid, instance.transfer_syntax_uid)
            assert context is not None
            try:
                status = requestor.store(context, instance.sop_instance_uid, instance.chunks())
            except BaseException:
                self._load.unanswered(number)
                raise
            self._load.answered(number, status, instance.size)
            self._pause(self._pause_s)

    def _pause(self, pause_s: float) -> None:
        if pause_s:
            threading.Event().wait(pause_s)


def enter(namespace: str) -> None:
    """This thread's sockets are made in that network namespace from here on."""
    fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "the namespace can't be entered")
    finally:
        os.close(fd)


@dataclass(slots=True)
class Seen:
    """What the hub said of the ward, whenever that changed."""

    at_us: int
    complete_to_us: int


class Watch(threading.Thread):
    """Looks at what the region says and has, and at the memory of its processes, ten times a second."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(name="watch", daemon=True)
        self._trial = trial
        self._over = threading.Event()
        self.seen: list[Seen] = []
        self.held = 0
        self.backlog_max = 0
        self.rss_max: dict[str, int] = {}
        self._ledger = Ledger.open(configuration.hub(trial.region.hub_toml).ledger)
        self._reader = Archive.open(trial.hub_archive, outbox=False, read_only=True)

    def run(self) -> None:
        while not self._over.wait(0.1):
            with suppress(MissError):  # a full disk, a database that another process recovers just now
                self._look()

    def _look(self) -> None:
        trial = self._trial
        state = self._ledger.ward_states().get(RADIOLOGY.id)
        now_us = time.time_ns() // 1000
        if state is not None and (not self.seen or self.seen[-1].complete_to_us != state.complete_to_us):
            self.seen.append(Seen(now_us, state.complete_to_us))
        self.held = self._reader.index.totals().instances
        self.backlog_max = max(self.backlog_max, len(trial.load.acknowledged) - self.held)
        for child in (*trial.hubs, trial.node):
            if child.running:
                self.rss_max[child.name] = max(self.rss_max.get(child.name, 0), rss(child.pid))

    def stop(self) -> None:
        self._over.set()
        self.join(30)
        self._reader.close()
        self._ledger.close()


def rss(pid: int) -> int:
    """The resident memory of a process."""
    with suppress(OSError), open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


@dataclass
class Trial:
    """See the module's docstring. `hubs` of more than one stand by for each other."""

    folder: Path
    link: Link | None = None
    mix: Mix = Mix()
    hub_count: int = 1
    modalities: int = 2
    pause_s: float = 0.01
    node_options: Sequence[str] = ()
    hub_options: Sequence[str] = ()
    recoveries: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.region = LocalRegion(self.folder / "state", "trial", [RADIOLOGY], Ports.free(1), portal=False)
        self.load = Load(self.mix)
        self._over = threading.Event()
        self._threads: list[Modality] = []

    def __enter__(self) -> Trial:
        self.region.start()
        self.region.stop()
        [self.ward] = self.region.wards
        self.ward.allow([CALLING])
        self.hub_archive = configuration.hub(self.region.hub_toml).archive_settings()
        self.node_archive = configuration.node(self.ward.settings).archive_settings()
        self._ae_title = self.ward.ae_title
        self.hub_ports = [self.region.ports.hub, *free_ports(self.hub_count - 1)]
        self.hubs = [self._hub(number) for number in range(self.hub_count)]
        self.node = self._node()
        try:
            for number in range(self.hub_count):
                self.start_hub(number)
            self.start_node()
            self.watch = Watch(self)
            self.watch.start()
        except BaseException:
            self.stop_all()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.watch.stop()
        self.stop_all()

    def stop_all(self) -> None:
        for child in (self.node, *self.hubs):
            child.ask_to_stop()
        for child in (self.node, *self.hubs):
            child.stop()

    def _hub(self, number: int) -> Child:
        options = ["host=0.0.0.0", *self.hub_options]
        if self.hub_count > 1:
            options += [f"name=hub{number}", f"port={self.hub_ports[number]}", "standby=true",
                        f"enrolment.port={free_ports(1)[0]}", f"addresses={','.join(self.hub_addresses)}"]
        return self._child(f"hub{number}", ["hub", "run", "--settings", str(self.region.hub_toml)], options)

    def _node(self) -> Child:
        options = [f"uplink.hub_address={self.hub_addresses[0]}", *self.node_options]
        return self._child("node", ["node", "run", "--settings", str(self.ward.settings)], options,
                           before=self.link.far if self.link else ())

    def _child(self, name: str, command: list[str], options: Sequence[str],
               before: Sequence[str] = ()) -> Child:
        flags = [part for option in options for part in ("--set", option)]
        return Child(name, [*command, *flags, "--log-level", "INFO"], self.folder / f"{name}.log", before)

    @property
    def hub_addresses(self) -> list[str]:
        host = self.link.near_address if self.link else HOST
        return [f"{host}:{port}" for port in self.hub_ports]

    @property
    def namespace(self) -> str:
        return self.link.name if self.link else ""

    # --- what happens

    def start_hub(self, number: int = 0) -> None:
        child, port = self.hubs[number], self.hub_ports[number]
        child.start()
        wait_until(child.name, lambda: listening(HOST, port), timeout_s=START_S_MAX, children=[child])

    def start_node(self) -> None:
        self.node.start()
        wait_until("the node", self._node_answers, timeout_s=START_S_MAX, children=[self.node])

    def _node_answers(self) -> bool | None:
        if not self.link:
            return listening(HOST, self.ward.port)
        asked = subprocess.run([*self.link.far, "bash", "-c", f"exec 3<>/dev/tcp/{HOST}/{self.ward.port}"],
                               capture_output=True, check=False)
        return asked.returncode == 0 or None

    def begin(self) -> None:
        """The modalities begin."""
        def peer() -> Peer:
            return Peer(HOST, self.ward.port, self._ae_title)

        for _ in range(self.modalities):
            one = Modality(self.load, peer, self._over, self.pause_s, self.namespace)
            self._threads.append(one)
            one.start()
        self.await_region()

    def end(self, timeout_s: float = 120.0) -> None:
        """The modalities get the answers that they lack, and end."""
        self._over.set()
        for thread in self._threads:
            thread.join(timeout_s)
            assert not thread.is_alive(), "a modality waits for an answer"
            assert thread.failed is None
        assert self.load.wrong == []
        assert self.load.left == 0

    def await_region(self, timeout_s: float = 120.0) -> float:
        """How long it takes, from here on, until something arrives in the region."""
        held, begun_s = self.watch.held, time.monotonic()
        wait_until("the region's getting something", lambda: self.watch.held > held or None,
                   timeout_s=timeout_s, children=[self.node])
        self.recoveries.append(time.monotonic() - begun_s)
        return self.recoveries[-1]

    def await_complete(self, timeout_s: float = 60.0) -> None:
        """Returns when the region says anew that it has everything."""
        said = len(self.watch.seen)
        self.await_region()
        wait_until("the region's being complete", lambda: len(self.watch.seen) > said or None,
                   timeout_s=timeout_s, children=[self.node])

    def drain(self, timeout_s: float = 300.0) -> float:
        """How long it takes, from here on, until the node has all receipts."""
        begun_s = time.monotonic()
        with Archive.open(self.node_archive, outbox=True, read_only=True) as node:
            def pending() -> bool | None:
                node.wait_indexed()
                return node.index.pending_summary().count == 0 or None

            wait_until("all receipts", pending, timeout_s=timeout_s, children=[self.node])
        return time.monotonic() - begun_s

    def drain_below(self, count: int, timeout_s: float = 600.0) -> float:
        """How long it takes, from here on, until less than that is on its way, though modalities go on."""
        begun_s = time.monotonic()
        wait_until("the backlog's end",
                   lambda: len(self.load.acknowledged) - self.watch.held < count or None,
                   timeout_s=timeout_s, children=[self.node])
        return time.monotonic() - begun_s

    # --- what has to be true

    def check(self, *, rebuilt: bool = False) -> None:
        """Ends everything and looks at what is on the disks; `rebuilt`: both indexes are made anew and
        compared."""
        from archive.rebuild import rebuild

        self.watch.stop()
        self.stop_all()
        sent = self.expected()
        assert read_whole(self.hub_archive, outbox=False) == sent
        assert read_whole(self.node_archive, outbox=True) == sent
        receipts = self._receipts()
        assert receipts.keys() == sent.keys()
        assert all(digest == sent[uid] for uid, (digest, _) in receipts.items())
        self._check_coverage({uid: at_us for uid, (_, at_us) in receipts.items()})
        if rebuilt:
            for settings, outbox in ((self.node_archive, True), (self.hub_archive, False)):
                before = dump(settings, outbox=outbox)
                rebuild(settings, outbox=outbox)
                assert dump(settings, outbox=outbox) == before

    def expected(self) -> dict[str, bytes]:
        """UID and digest of everything that was acknowledged."""
        found = {}
        for number in self.load.acknowledged:
            instance = self.load.instance(number)
            digest = hashlib.sha256()
            for chunk in instance.chunks():
                digest.update(chunk)
            found[instance.sop_instance_uid] = digest.digest()
        return found

    def _receipts(self) -> dict[str, tuple[bytes, int]]:
        found: dict[str, tuple[bytes, int]] = {}
        with Archive.open(self.node_archive, outbox=True) as node:
            assert node.index.pending_summary().set_aside == 0
            for batch in node.facts.read(kinds=[FactKind.RECEIPT]):
                for fact in batch.facts:
                    if fact.kind is FactKind.RECEIPT:
                        found.setdefault(fact.sop_instance_uid, (fact.digest, fact.at_us))
        return found

    def _check_coverage(self, arrived_us: dict[str, int]) -> None:
        """No `complete_to` that was seen is later than the acknowledgement of something that was to come."""
        came = sorted((arrived_us[self.load.instance(number).sop_instance_uid], at_us)
                      for number, at_us in self.load.acknowledged.items())
        false = []
        for seen in self.watch.seen:
            late = [at_us for arrival, at_us in came
                    if arrival > seen.at_us and at_us < seen.complete_to_us - SKEW_US]
            if late:
                early_s = (seen.complete_to_us - min(late)) / 1e6
                false.append(f"{len(late)} missing, the first acknowledged {early_s:.3f} s before")
        assert false == [], f"{len(false)} of {len(self.watch.seen)}: {false[:5]}"

    def figures(self) -> str:
        """What it came to."""
        line = ""
        if self.link is not None:
            carried = self._carried
            line = f", {carried / 1e6:.1f} MB on the line ({carried / max(self.load.bytes, 1) - 1:+.1%})"
        memory = ", ".join(f"{name} {size >> 20} MiB" for name, size in sorted(self.watch.rss_max.items()))
        longest = max(self.recoveries, default=0.0)
        return (f"{len(self.load.acknowledged)} stored, {self.load.bytes / 1e6:.1f} MB{line}; "
                f"backlog {self.watch.backlog_max}; {len(self.recoveries) - 1} recoveries, the longest "
                f"{longest:.1f} s; {len(self.watch.seen)} times complete; memory: {memory}")

    @property
    def _carried(self) -> int:
        assert self.link is not None
        return self.link.carried()[0]


def read_whole(settings: ArchiveSettings, *, outbox: bool) -> dict[str, bytes]:
    """UID and digest of every instance, as its pack has it; each must be there once, whole, and be in the
    index."""
    with Archive.open(settings, outbox=outbox) as archive:
        archive.wait_indexed()
        found: dict[str, bytes] = {}
        for item in records(archive):
            assert item.head.sop_instance_uid not in found, "an instance is there twice"
            archive.packs.verify(item.head, item.digest, item.location)
            found[item.head.sop_instance_uid] = item.digest
        totals = archive.index.totals()
        assert (totals.instances, totals.conflicts) == (len(found), 0)
        return found


def records(archive: Archive) -> Iterator[Record]:
    for item in archive.packs.read(START, archive.packs.log.durable):
        assert isinstance(item, Record), f"damaged: {item}"
        yield item


def dump(settings: ArchiveSettings, *, outbox: bool) -> dict[str, list[tuple[object, ...]]]:
    with Archive.open(settings, outbox=outbox, read_only=True) as archive:
        return archive.index.dump()
