"""The rows about replication: a node that holds a backlog delivers it to a hub, disk to disk, verified,
indexed and receipted. On this machine it is held against a bare gRPC stream of as many octets; over a line
(`bench/link.py`) against Orthanc, which pushes the same instances to another Orthanc as fast as it can, and
against the line itself.

The clock is the hub's: from the attach of the node with its backlog to the report that nothing is pending.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from archive.archive import Archive
from archive.errors import MissError, Unavailable
from archive.ledger import WardState
from bench.link import FAST, THIN, Link, Shape
from bench.runs import Bench
from bench.servers import Orthanc
from bench.table import Bar, Result
from miss import configuration
from miss.backlog import node_backlog
from miss.load import usage
from miss.load.instances import Corpus
from miss.load.sender import CALLING_AE, Plan, Target, send
from miss.local import HOST, LocalRegion, Ports, WardPlan
from miss.processes import Child, free_ports, listening, wait_until

WARD = WardPlan("Bench", "Load", "BENCH")
LOADING_ASSOCIATIONS = 4
LOADING_S_MAX = 600.0
DELIVERY_S_MAX = 1800.0
START_S_MAX = 60.0
POLL_S = 0.02
CEILING_BYTES = 1_500_000_000
MESSAGE_BYTES = 1 << 20
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
PLAIN = ("uplink.zstd=false",)


@dataclass(frozen=True, slots=True)
class Delivered:
    """What one delivery came to."""

    count: int
    octets: int
    seconds: float
    cpu_s: float

    @property
    def bytes_per_s(self) -> float:
        return self.octets / self.seconds

    @property
    def per_s(self) -> float:
        return self.count / self.seconds


class Backlog:
    """A region of one ward in `folder`, and a backlog in its node; nothing runs."""

    def __init__(self, folder: Path, corpus: Corpus, count: int) -> None:
        self.region = LocalRegion(folder, "bench", [WARD], Ports.free(1), portal=False, log_level="WARNING")
        self.folder = folder
        self.corpus = corpus
        self.count = count
        self.octets = sum(corpus.instance(number).size for number in range(count))
        self.region.start()
        self.region.stop()
        [self.ward] = self.region.wards
        self.ward.allow([CALLING_AE], HOST)
        self._load()

    def _load(self) -> None:
        node = self._node("uplink.enabled=false")
        node.start()
        try:
            wait_until("the node", lambda: listening(HOST, self.ward.port), timeout_s=START_S_MAX,
                       children=[node])
            tally = send(Target(self.ward.port, self.ward.ae_title), self.corpus,
                         Plan(LOADING_ASSOCIATIONS, LOADING_S_MAX, self.count))
        finally:
            node.stop()
        if tally.stored != self.count:
            raise Unavailable(f"{tally.stored} of {self.count} instances were stored")

    def deliver(self, link: Link | None, options: Sequence[str] = ()) -> Delivered:
        """Starts hub and node, the node at the far end of the link; returns when all has receipts."""
        hub_host = HOST if link is None else link.near_address
        hub = Child("hub", ["hub", "run", "--settings", str(self.region.hub_toml), "--set",
                            "host=0.0.0.0", "--log-level", "WARNING"], self.folder / "hub.log")
        node = self._node(f"uplink.hub_address={hub_host}:{self.region.ports.hub}", *options,
                          before=[] if link is None else link.far)
        hub.start()
        try:
            wait_until("the hub", lambda: listening(HOST, self.region.ports.hub), timeout_s=START_S_MAX,
                       children=[hub])
            node.start()
            try:
                state = self._await_end(hub, node)
                spent = sum(usage.cpu_s(usage.tree(child.pid)) for child in (hub, node))
            finally:
                node.stop()
        finally:
            hub.stop()
        self._check()
        return Delivered(self.count, self.octets, (state.complete_to_us - state.attached_since_us) / 1e6,
                         spent)

    def _await_end(self, hub: Child, node: Child) -> WardState:
        with self.region.ledger() as ledger:
            def ended() -> WardState | None:
                state = ledger.ward_states().get(WARD.id)
                whole = state is not None and state.attached and state.pending == 0 and (
                    state.attached_since_us < state.seen_us and state.last_receipt_us)
                return state if whole else None

            deadline = time.monotonic() + DELIVERY_S_MAX
            while (state := ended()) is None:
                if time.monotonic() > deadline or not hub.running or not node.running:
                    raise Unavailable(f"not all was delivered; logs are in {self.folder}")
                time.sleep(POLL_S)
            return state

    def _check(self) -> None:
        """Both disks say that all of it is in the region."""
        left = node_backlog(self.ward.state).pending
        settings = configuration.hub(self.region.hub_toml).archive_settings()
        archive = Archive.open(settings, outbox=False, read_only=True)
        try:
            held = archive.index.totals().instances
        finally:
            archive.close()
        if left or held != self.count:
            raise Unavailable(f"the region holds {held} of {self.count}, {left} are pending")

    def _node(self, *options: str, before: Sequence[str] = ()) -> Child:
        flags = [part for option in options for part in ("--set", option)]
        return Child("node", ["node", "run", "--settings", str(self.ward.settings), *flags, "--log-level",
                              "WARNING"], self.folder / "node.log", before)


class PushingOrthanc(Orthanc):
    """An Orthanc that takes and gives by HTTP: its peers' own protocol and, with its plugin, STOW-RS."""

    def __init__(self, folder: Path, link: Link | None = None, to: str = "") -> None:
        super().__init__(folder)
        self.link = link
        self.to = to

    def command(self) -> list[str]:
        program, file = super().command()
        settings = json.loads(Path(file).read_text())
        plugin = dicomweb_plugin()
        settings |= {
            "RemoteAccessAllowed": True, "Plugins": [plugin] if plugin else [], "HttpTimeout": 0,
            "ConcurrentJobs": 4, "JobsHistorySize": 10_000, "DicomWeb": {"Enable": True},
        }
        if self.to:
            settings |= {
                "OrthancPeers": {"to": [self.to, "", ""]},
                "DicomWeb": {"Enable": True, "Servers": {"to": {"Url": f"{self.to}dicom-web/"}}},
            }
        Path(file).write_text(json.dumps(settings))
        # The line is no way to a proxy.
        return [*(self.link.far if self.link is not None else []), "env", "no_proxy=*", program, file]

    def _up(self) -> bool | None:
        if self.link is None:
            return super()._up()
        if self._process is not None and self._process.poll() is not None:
            raise Unavailable(f"{self.name} ended with code {self._process.returncode}")
        try:
            self.get("/system")
        except OSError:
            return None
        return True

    @property
    def url(self) -> str:
        host = HOST if self.link is None else self.link.far_address
        return f"http://{host}:{self._http_port}"

    def near(self, link: Link | None) -> str:
        """Its address for another at the far end."""
        return f"http://{HOST if link is None else link.near_address}:{self._http_port}/"

    def get(self, path: str) -> Any:
        with DIRECT.open(f"{self.url}{path}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: object) -> None:
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with DIRECT.open(request, timeout=DELIVERY_S_MAX) as answer:
            answer.read()


def dicomweb_plugin() -> str:
    """Orthanc's plugin for DICOMweb, where Debian puts it; empty when it is not there."""
    found = sorted(Path("/usr/share/orthanc/plugins").glob("libOrthancDicomWeb*.so"))
    return str(found[0]) if found else ""


def push_by_orthanc(bench: Bench, link: Link | None, corpus: Corpus, count: int, way: str) -> Delivered:
    """An Orthanc at the far end is loaded, and gives everything to one at the near end. `way` is `peer` or
    `stow`; series by series, four at once."""
    with ExitStack() as stack:
        taker = stack.enter_context(PushingOrthanc(stack.enter_context(bench.fresh("taker"))))
        folder = stack.enter_context(bench.fresh("giver"))
        with PushingOrthanc(folder) as giver:  # loaded beside the line
            tally = send(giver.target, corpus, Plan(LOADING_ASSOCIATIONS, LOADING_S_MAX, count))
            if problem := giver.problem(corpus, tally):
                raise Unavailable(f"Orthanc, while it was loaded: {problem}")
        pushing = PushingOrthanc(folder, link, taker.near(link))
        stack.enter_context(pushing)
        series = pushing.get("/series")
        before = usage.cpu_s(usage.tree(taker.pid)) + usage.cpu_s(usage.tree(pushing.pid))
        start = time.perf_counter()

        def push(one: str) -> None:
            if way == "peer":
                pushing.post("/peers/to/store", {"Resources": [one], "Synchronous": True})
            else:
                pushing.post("/dicom-web/servers/to/stow", {"Resources": [one], "Synchronous": True})

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(push, series))
        spent = time.perf_counter() - start
        cpu_s = usage.cpu_s(usage.tree(taker.pid)) + usage.cpu_s(usage.tree(pushing.pid)) - before
        if (held := taker.held()) != count:
            raise Unavailable(f"the other Orthanc holds {held} of {count}")
        return Delivered(count, sum(corpus.instance(number).size for number in range(count)), spent, cpu_s)


@contextmanager
def _line(shape: Shape | None, congestion: str) -> Iterator[Link | None]:
    if shape is None:
        yield None
        return
    with Link(shape, congestion=congestion) as link:
        yield link


class Ceiling:
    """A server of bare streams, at the near end."""

    def __init__(self, bench: Bench, link: Link | None) -> None:
        self._certificates = bench.certificates.trust.parent
        self._link = link
        [self._port] = free_ports(1, HOST)
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-P", "-m", "bench.ceiling", "serve", str(self._port)]
        self._server = subprocess.Popen([*command, str(self._certificates)], cwd=Path(__file__).parent.parent)
        wait_until("the bare stream", lambda: listening(HOST, self._port), timeout_s=START_S_MAX)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.terminate()
        self._server.wait()

    def bytes_per_s(self, total: int) -> float:
        host = HOST if self._link is None else self._link.near_address
        before = [] if self._link is None else self._link.far
        done = subprocess.run(
            [*before, sys.executable, "-P", "-m", "bench.ceiling", "send", f"{host}:{self._port}",
             str(self._certificates), str(total), str(MESSAGE_BYTES)],
            cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"a bare stream failed: {done.stderr[-300:]}")
        return float(done.stdout)


@dataclass(frozen=True, slots=True)
class CeilingRow:
    """Against a bare stream, on this machine."""

    key: str = "replicate"

    def measure(self, bench: Bench) -> list[Result]:
        scale, results = bench.scale, []
        with Ceiling(bench, None) as ceiling:
            for corpus, count, unit, bar in (
                (bench.ct, scale.replicated_ct, "MB/s", Bar(least_ratio=0.6)),
                (bench.small, scale.replicated_small, "instances/s", Bar(least=2_000)),
            ):
                ours: list[Delivered] = []
                theirs: list[float] = []
                for _ in range(scale.rounds):
                    with bench.fresh("replicate") as folder:
                        backlog = Backlog(folder, corpus, count)
                        bench.wait_until_quiet()
                        ours.append(backlog.deliver(None))
                    theirs.append(ceiling.bytes_per_s(min(CEILING_BYTES, 20 * backlog.octets)))
                    bench.say(f"  {corpus.name}: {_said(ours[-1])}; "
                              f"a bare stream {theirs[-1] / 1e6:,.0f} MB/s")
                figures = [one.bytes_per_s / 1e6 if unit == "MB/s" else one.per_s for one in ours]
                results.append(Result(
                    self.key, f"node to hub on one machine, {count:,} of {corpus.name}", unit, tuple(figures),
                    "bare gRPC" if unit == "MB/s" else "",
                    tuple(one / 1e6 for one in theirs) if unit == "MB/s" else (), bar))
                results.append(Result(self.key, f"the same, {corpus.name}, both sides together",
                                      "CPU s per GB", tuple(1e9 * one.cpu_s / one.octets for one in ours)))
        return results


@dataclass(frozen=True, slots=True)
class PeerRow:
    """Against Orthanc's better push, over the fast line."""

    key: str = "push-fast"

    def measure(self, bench: Bench) -> list[Result]:
        scale = bench.scale
        works = ((bench.ct, scale.replicated_ct, "MB/s", Bar(least_ratio=3)),
                 (bench.small, scale.replicated_small, "instances/s", Bar(least_ratio=4)))
        if missing := Link.missing():
            return [Result(self.key, f"{corpus.name} over a line", unit, void=missing)
                    for corpus, _, unit, _ in works]
        peer_missing = Orthanc.missing(tls=False)
        results = []
        for corpus, count, unit, bar in works:
            ours, theirs = [], []
            for _ in range(scale.rounds):
                with Link(FAST) as link:
                    with bench.fresh("push") as folder:
                        backlog = Backlog(folder, corpus, count)
                        bench.wait_until_quiet()
                        ours.append(backlog.deliver(link))
                    bench.say(f"  MISS, {corpus.name}: {_said(ours[-1])}")
                    if not peer_missing:
                        ways = ("peer", *(("stow",) if dicomweb_plugin() else ()))
                        found = [self._by_orthanc(bench, link, corpus, count, way) for way in ways]
                        pushed = [one for one in found if one is not None]
                        theirs += sorted(pushed, key=lambda one: one.bytes_per_s)[-1:]
            def figure(one: Delivered, unit: str = unit) -> float:
                return one.bytes_per_s / 1e6 if unit == "MB/s" else one.per_s

            results.append(Result(
                self.key, f"{count:,} of {corpus.name} over 1 Gbit/s", unit, tuple(map(figure, ours)),
                "Orthanc, its better push", tuple(map(figure, theirs)), bar, peer_missing))
        return results

    def _by_orthanc(
        self, bench: Bench, link: Link, corpus: Corpus, count: int, way: str
    ) -> Delivered | None:
        """None when it does not push that way here."""
        bench.wait_until_quiet()
        try:
            pushed = push_by_orthanc(bench, link, corpus, count, way)
        except urllib.error.HTTPError as error:
            bench.say(f"  Orthanc by {way}: {error}")
            return None
        bench.say(f"  Orthanc by {way}, {corpus.name}: {_said(pushed)}")
        return pushed


@dataclass(frozen=True, slots=True)
class ThinRow:
    """Against the line itself: how much of 20 Mbit/s is instances."""

    key: str = "push-thin"

    def measure(self, bench: Bench) -> list[Result]:
        count = bench.scale.replicated_thin
        work = f"{count} of CT over 20 Mbit/s, 40 ms, 1 % lost"
        if missing := Link.missing():
            return [Result(self.key, work, "MB/s", void=missing)]
        line = THIN.bits_per_s / 8e6
        results = []
        for congestion, options, least, words in (
            ("cubic", PLAIN, 0.88, "CUBIC, as it is"), ("bbr", PLAIN, 0.9, "BBR, as it is"),
            ("cubic", (), 0.85, "CUBIC, zstd as it thinks best"),
        ):
            ours = []
            for number in range(bench.scale.rounds):
                with Link(replace(THIN, seed=number + 1), congestion=congestion) as link:
                    with bench.fresh("thin") as folder:
                        backlog = Backlog(folder, bench.ct, count)
                        bench.wait_until_quiet()
                        ours.append(backlog.deliver(link, options))
                    bench.say(f"  {words}: {_said(ours[-1])}, {link.carried()[0] / 1e6:,.1f} MB on the line")
            ratio = 1.0 if options else compression(bench.ct)
            results.append(Result(
                self.key, f"{work}; {words}", "MB/s", tuple(one.bytes_per_s / 1e6 for one in ours),
                "the line" if options else f"the line x {ratio:.2f}", tuple(line * ratio for _ in ours),
                Bar(least_ratio=least)))
        return results


def compression(corpus: Corpus) -> float:
    """How much smaller zstd makes its instances, at its own default level."""
    import zstandard

    octets = b"".join(b"".join(corpus.instance(number).chunks()) for number in range(4))
    return len(octets) / len(zstandard.ZstdCompressor(level=3).compress(octets))


def _said(one: Delivered) -> str:
    return (f"{one.bytes_per_s / 1e6:,.1f} MB/s, {one.per_s:,.0f}/s in {one.seconds:.1f} s, "
            f"{1e9 * one.cpu_s / one.octets:.2f} CPU s/GB")


class _Guarded:
    """A row whose servers may not start: then it says so, and the table goes on."""

    def __init__(self, row: CeilingRow | PeerRow | ThinRow) -> None:
        self._row = row

    @property
    def key(self) -> str:
        return self._row.key

    def measure(self, bench: Bench) -> list[Result]:
        try:
            return self._row.measure(bench)
        except (MissError, OSError) as error:
            return [Result(self.key, "replication", "MB/s", void=f"void: {error}")]


REPLICATION_ROWS = tuple(_Guarded(row) for row in (CeilingRow(), PeerRow(), ThinRow()))
