"""The hub's end of facts that travel: wards tell theirs, which are judged (`facts_rules.py`), recorded in the
region's fact log and told on; and each ward is told what concerns it. Who calls is the certificate's word, by
`certs/gate.py`.

Removals concern every ward. Corrections are patient data: they go to the wards that hold a part of the study,
which may come to hold it later: what arrives of a corrected study has them told to its ward out of order, and
when a ward asks for the first time after it attached, what it knows of them is compared by a sum.

A ward is told that something waits; one that is not reached asks when it attaches. Bounds: pages as in
`facts_pages.py`, calls at once in all and for each ward, 10,000 arrivals looked at together; a reader that
takes nothing for five minutes loses its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from archive.archive import Archive
from archive.corrections import facts_of
from archive.errors import InvalidInput, MissError, OutOfResources
from archive.index.travel import TRAVELLING, Cursor, sum_of
from archive.model import Fact, FactKind
from certs.gate import peer
from federation import serde_facts, status
from federation.abilities import FACTS
from federation.arrivals import Arrivals
from federation.attachments import Attachments
from federation.facts_pages import PAGE_FACTS_MAX, Page, cut, keep_cursor, pages, take
from federation.facts_rules import FactRules
from federation.pools import Pools
from protos import facts_pb2, facts_pb2_grpc

log = logging.getLogger(__name__)

CALLS_MAX = 64
CALLS_PER_WARD_MAX = 4
ARRIVED_MAX = 10_000
GATHER_S = 0.2  # what arrives, and what is recorded, is looked at together
RETRY_S = 5.0


class FactsService(facts_pb2_grpc.FactsServicer):
    """Implements `miss.v1.Facts`. `start` before it serves, `stop` after."""

    def __init__(
        self, archive: Archive, attachments: Attachments, arrivals: Arrivals, pools: Pools
    ) -> None:
        self._archive = archive
        self._attachments = attachments
        self._pools = pools
        self._rules = FactRules(archive, pools.clock)
        self._calls: Counter[str] = Counter()
        self._turns: dict[str, asyncio.Lock] = {}
        self._arrived: set[str] = set()
        self._late: dict[str, set[str]] = {}  # by ward: corrected studies of which it holds more than it did
        self._recorded = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unwatch: Callable[[], None] = _nothing
        arrivals.tell(self._came)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._unwatch = self._archive.watch_facts(self._hear)
        self._task = asyncio.create_task(self._watch(), name="facts")

    async def stop(self) -> None:
        self._unwatch()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # What wards tell.

    async def Tell(self, request: facts_pb2.TellFacts, context: Any) -> facts_pb2.ToldFacts:
        ward = peer(context).ward
        try:
            with self._call(ward):
                async with self._turns.setdefault(ward, asyncio.Lock()):
                    return await self._pools.work(self._told, ward, request)
        except Exception as error:
            await status.abort(context, error)

    def _told(self, ward: str, request: facts_pb2.TellFacts) -> facts_pb2.ToldFacts:
        if len(request.facts) > PAGE_FACTS_MAX:
            raise InvalidInput(f"at most {PAGE_FACTS_MAX} facts are told at once")
        if len(request.log) > serde_facts.LOG_BYTES_MAX:
            raise InvalidInput("no log has such a name")
        self._archive.wait_indexed()
        refused: dict[int, str] = {}
        taken: list[Fact] = []
        for number, message in enumerate(request.facts):
            try:
                fact = serde_facts.fact_from(message)
            except InvalidInput as error:
                refused[number] = str(error)
                continue
            reason = self._rules.refusal(ward, fact) if self._archive.index.travel.unknown([fact]) else ""
            if reason:
                refused[number] = reason
                log.warning("%s: what it decided about %s is refused: %s", ward, message.uid, reason)
            else:
                taken.append(fact)
        take(self._archive, taken)
        if request.HasField("to"):
            keep_cursor(self._archive, _teller(ward), serde_facts.cursor_from(request.to))
        known = self._archive.index.travel.cursor(_teller(ward))
        reply = facts_pb2.ToldFacts(refused=[
            facts_pb2.FactRefused(index=number, reason=reason) for number, reason in refused.items()
        ])  # fmt: skip
        if known.log and known.log == request.log:
            reply.cursor.CopyFrom(serde_facts.cursor_to(known))
        return reply

    # What wards are told.

    async def Next(  # type: ignore[override]
        self, request: facts_pb2.NextFacts, context: Any
    ) -> None:
        ward = peer(context).ward
        try:
            with self._call(ward):
                cursor = serde_facts.cursor_from(request.cursor) if request.HasField("cursor") else Cursor()
                late = frozenset(self._late.get(ward, ()))
                told = self._pages(ward, cursor, request, late)
                while (page := await self._pools.work(next, told, None)) is not None:
                    await status.write(context, _page_to(page))
                if ward in self._late:
                    self._late[ward] -= late
        except Exception as error:
            await status.abort(context, error)

    def _pages(
        self, ward: str, cursor: Cursor, request: facts_pb2.NextFacts, late: Iterable[str]
    ) -> Iterator[Page]:
        self._archive.wait_indexed()
        travel = self._archive.index.travel

        def concern(facts: Sequence[Fact]) -> list[Fact]:
            studies = {fact.sop_instance_uid for fact in facts if fact.kind is FactKind.CORRECTED}
            holders = travel.holders(studies) if studies else {}
            return [
                fact for fact in facts
                if (request.own if fact.ward == ward else self._is_founded(fact))
                and (fact.kind is not FactKind.CORRECTED or fact.ward == ward
                     or ward in holders.get(fact.sop_instance_uid, ()))
            ]  # fmt: skip

        known = travel.corrections_of(late) if late else []
        if request.compare:
            held = travel.corrections_at(ward)
            if sum_of(_not_of(ward, held)) != request.corrections:
                known = held
        wanted = [fact for one in known for fact in facts_of(one) if request.own or fact.ward != ward]
        for piece in cut(wanted):
            yield Page(tuple(piece), None)
        yield from pages(self._archive, cursor, concern)

    def _is_founded(self, fact: Fact) -> bool:
        """Whether others are told of it: a ward's removal of what it never gave to the region is its own
        affair, since who only guesses a UID could hide it elsewhere."""
        if fact.kind is not FactKind.REMOVED or not fact.ward:
            return True
        return fact.ward in self._archive.index.travel.known_at(fact.sop_instance_uid)

    @contextlib.contextmanager
    def _call(self, ward: str) -> Iterator[None]:
        if self._calls.total() >= CALLS_MAX or self._calls[ward] >= CALLS_PER_WARD_MAX:
            raise OutOfResources("too many facts are told at once")
        self._calls[ward] += 1
        try:
            yield
        finally:
            self._calls[ward] -= 1

    # Who is to be told that there is something.

    def _hear(self, facts: Sequence[Fact]) -> None:
        """In the thread that recorded them."""
        if any(fact.kind in TRAVELLING for fact in facts) and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._note_recorded)

    def _note_recorded(self) -> None:
        self._recorded = True
        self._wake.set()

    def _came(self, uids: Iterable[str]) -> None:
        room = ARRIVED_MAX - len(self._arrived)
        for _, uid in zip(range(room), uids, strict=False):  # beyond: the sum shows it when the ward attaches
            self._arrived.add(uid)
        self._wake.set()

    async def _watch(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(GATHER_S)
            self._wake.clear()
            arrived, self._arrived = self._arrived, set()
            recorded, self._recorded = self._recorded, False
            try:
                late = await self._pools.work(self._corrected, arrived)
                for ward, studies in late.items():
                    self._late.setdefault(ward, set()).update(studies)
                self._tell(None if recorded else late.keys())
            except MissError as error:
                log.warning("it is not known which wards facts concern: %s", error)
                self._arrived |= arrived
                self._recorded |= recorded
                await asyncio.sleep(RETRY_S)
                self._wake.set()

    def _corrected(self, uids: set[str]) -> dict[str, set[str]]:
        """By ward, the corrected studies of which something arrived."""
        travel = self._archive.index.travel
        if not uids or not travel.has_corrections():
            return {}
        self._archive.wait_indexed()
        found: dict[str, set[str]] = {}
        for study, wards in travel.holders(travel.corrected_among(uids)).items():
            for ward in wards:
                found.setdefault(ward, set()).add(study)
        return found

    def _tell(self, wards: Iterable[str] | None) -> None:
        """`None` is every ward."""
        for ward in self._attachments.states if wards is None else wards:
            attachment = self._attachments.attached(ward)
            if attachment is not None and FACTS in attachment.abilities:
                self._attachments.come(ward, facts=True)


def _nothing() -> None:
    """Nothing is watched yet."""


def _teller(ward: str) -> str:
    return f"facts:{ward}"


def _not_of(ward: str, corrections: Iterable[Any]) -> list[Fact]:
    return [fact for one in corrections for fact in facts_of(one) if fact.ward != ward]


def _page_to(page: Page) -> facts_pb2.FactsPage:
    message = facts_pb2.FactsPage(facts=map(serde_facts.fact_to, page.facts), last=page.last)
    if page.cursor is not None:
        message.cursor.CopyFrom(serde_facts.cursor_to(page.cursor))
    return message
