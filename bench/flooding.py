"""The row about a ward that floods: how long another ward's backlog takes beside it, against the same backlog
alone. All three processes are on this machine, so that most of what it costs is the processor that they
share, not the place at the hub."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from archive.errors import MissError, Unavailable
from archive.ledger import WardState
from bench.runs import Bench
from bench.table import Result
from miss.load.instances import Corpus
from miss.load.sender import CALLING_AE, Plan, Target, send
from miss.local import HOST, LocalRegion, LocalWard, Ports, WardPlan
from miss.processes import Child, listening, wait_until

FLOODING = WardPlan("Flood", "Load", "FLOOD")
OTHER = WardPlan("Other", "Load", "OTHER")
START_S_MAX = 60.0
LOADING_S_MAX = 600.0
DELIVERY_S_MAX = 600.0
WARM_S = 3.0  # until the flooding ward has all its streams open


@dataclass(slots=True)
class Flooded:
    """A region of two wards in `folder`, each with a backlog; nothing runs outside of `hub`."""

    folder: Path
    region: LocalRegion = field(init=False)
    was_over: bool = field(default=False, init=False)  # the flood, before the other ward's backlog

    def __post_init__(self) -> None:
        self.region = LocalRegion(self.folder, "bench", [FLOODING, OTHER], Ports.free(2), portal=False,
                                  log_level="WARNING")
        self.region.start()
        self.region.stop()

    def load(self, ward: LocalWard, corpus: Corpus, count: int) -> None:
        ward.allow([CALLING_AE], HOST)
        with self._node(ward, "uplink.enabled=false") as node:
            wait_until("the node", lambda: listening(HOST, ward.port), timeout_s=START_S_MAX, children=[node])
            tally = send(Target(ward.port, ward.ae_title), corpus, Plan(4, LOADING_S_MAX, count))
        if tally.stored != count:
            raise Unavailable(f"{tally.stored} of {count} instances were stored")

    def delivered_s(self, *, flooded: bool) -> float:
        """How long the other ward's backlog takes, over one push stream."""
        flooding, other = self.region.wards
        hub = Child("hub", ["hub", "run", "--settings", str(self.region.hub_toml), "--log-level", "WARNING"],
                    self.folder / "hub.log")
        hub.start()
        try:
            wait_until("the hub", lambda: listening(HOST, self.region.ports.hub), timeout_s=START_S_MAX,
                       children=[hub])
            if not flooded:
                return self._deliver(other)
            with self._node(flooding):
                self._await(FLOODING.id, lambda state: state.last_receipt_us > 0)
                time.sleep(WARM_S)
                spent = self._deliver(other)
                self.was_over = self._await(FLOODING.id, lambda state: state.attached).pending == 0
                return spent
        finally:
            hub.stop()

    def _deliver(self, ward: LocalWard) -> float:
        with self._node(ward, "uplink.push_streams=1"):
            state = self._await(OTHER.id, lambda state: (
                state.attached and state.pending == 0 and state.last_receipt_us > 0
                and state.attached_since_us < state.seen_us))
            return (state.complete_to_us - state.attached_since_us) / 1e6

    def _await(self, ward: str, when: Callable[[WardState], bool]) -> WardState:
        with self.region.ledger() as ledger:
            def reached() -> WardState | None:
                state = ledger.ward_states().get(ward)
                return state if state is not None and when(state) else None

            return wait_until(f"{ward} to get there", reached, timeout_s=DELIVERY_S_MAX)

    @contextmanager
    def _node(self, ward: LocalWard, *options: str) -> Iterator[Child]:
        flags = [part for option in options for part in ("--set", option)]
        node = Child("node", ["node", "run", "--settings", str(ward.settings), *flags,
                              "--log-level", "WARNING"], self.folder / f"node-{ward.port}.log")
        node.start()
        try:
            yield node
        finally:
            node.stop()


@dataclass(frozen=True, slots=True)
class FloodRow:
    """One ward sends over one stream what another sends beside it over twelve."""

    key: str = "flood"

    def measure(self, bench: Bench) -> list[Result]:
        scale, results = bench.scale, []
        for flood, floods, corpus, count in (
            (bench.ct, scale.replicated_ct, bench.small, max(scale.replicated_small // 10, 1)),
            (bench.small, 2 * scale.replicated_small, bench.ct, max(scale.replicated_ct // 10, 1)),
        ):
            work = f"{count:,} of {corpus.name} over one stream, beside a ward's flood of {flood.name}"
            note = ""
            beside: list[float] = []
            alone: list[float] = []
            try:
                for _ in range(scale.rounds):
                    for flooded, found in ((True, beside), (False, alone)):
                        with bench.fresh("flood") as folder:
                            wards = Flooded(folder)
                            if flooded:
                                wards.load(wards.region.wards[0], flood, floods)
                            wards.load(wards.region.wards[1], corpus, count)
                            bench.wait_until_quiet()
                            found.append(wards.delivered_s(flooded=flooded))
                            note = "the flood was over first" if wards.was_over else note
                    bench.say(f"  {work}: {beside[-1]:.2f} s, alone {alone[-1]:.2f} s")
            except MissError as error:
                results.append(Result(self.key, work, "s", void=f"void: {error}"))
                continue
            results.append(Result(self.key, work, "s", tuple(beside), "alone", tuple(alone), note=note))
        return results


FLOOD_ROWS = (FloodRow(),)
