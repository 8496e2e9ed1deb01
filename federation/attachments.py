"""Who is attached to the hub, what each ward said last, and the questions that are on their way to them.
Lives in the hub's event loop. A ward has one attachment at a time: a newer one takes the place of an older
one, since a node whose line was cut attaches again long before the hub can know that the first line is dead.

Bounds: 64 messages wait for a ward, 32 questions are open at one, an answer lists at most 1,000 UIDs. A ward
past them counts as one that does not answer. Ward states go to the ledger at every report, in one transaction
those of all wards that reported while the last one was written, so that a thousand wards cost twenty small
transactions a second; when the ledger can't be written the memory goes on, and the next report tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from archive.errors import MissError, NotFound, OutOfResources, Unavailable
from archive.ledger import WardState
from archive.model import Match, StoredInstance
from federation import abilities, coverage, serde
from federation.coverage import Report
from federation.fanout import PENDING_UIDS_MAX
from federation.gathering import LISTED_MAX
from federation.line import RegionPolicy
from protos import uplink_pb2

log = logging.getLogger(__name__)

OUTBOUND_MAX = 64
ASKS_MAX = 32
ANSWER_MATCHES_MAX = 2 * PENDING_UIDS_MAX
ANSWER_BYTES_MAX = 64 << 20  # of all its pages

KEEP_GAP_S = 0.05  # between two transactions of ward states

Keep = Callable[[Sequence[WardState]], Awaitable[None]]


@dataclass(eq=False, slots=True)
class Ask:
    """A question that is open at a ward, and what came of its answer so far."""

    id: str
    done: asyncio.Future[None]
    matches: list[Match] = field(default_factory=list)
    uids: int = 0
    bytes: int = 0
    truncated: bool = False
    listed: list[StoredInstance] | None = None  # to a question for a listing, by a ward that knows of it
    left_out: int = 0


@dataclass(eq=False, slots=True)
class Attachment:
    """One node's attach. `outbound` is written by the call's own handler."""

    ward: str
    outbound: asyncio.Queue[uplink_pb2.HubMessage]
    ended: asyncio.Future[str]
    abilities: frozenset[str] = frozenset()  # what both sides can
    asks: dict[str, Ask] = field(default_factory=dict)

    def end(self, reason: str) -> None:
        """Ends the attach; the questions that are open at the ward fail at once."""
        if not self.ended.done():
            self.ended.set_result(reason)
        for ask in self.asks.values():
            if not ask.done.done():
                ask.done.set_exception(Unavailable(reason))

    def send(self, message: uplink_pb2.HubMessage) -> None:
        try:
            self.outbound.put_nowait(message)
        except asyncio.QueueFull:
            raise OutOfResources("the ward does not take what is sent to it") from None


class Attachments:
    """The registry. `keep` writes ward states to the ledger."""

    def __init__(self, states: Mapping[str, WardState], keep: Keep, clock: Callable[[], int]) -> None:
        self._states = dict(states)
        self._keep = keep
        self._clock = clock
        self._attached: dict[str, Attachment] = {}
        self._unkept: set[str] = set()
        self._kept: asyncio.Future[None] | None = None  # done when what is in `_unkept` now was written
        self._keeping: asyncio.Task[None] | None = None

    @property
    def states(self) -> Mapping[str, WardState]:
        """What each ward said last."""
        return self._states

    def attached(self, ward: str) -> Attachment | None:
        return self._attached.get(ward)

    async def attach(self, ward: str, hello: uplink_pb2.Hello) -> Attachment:
        """A node said hello."""
        if (older := self._attached.get(ward)) is not None:
            older.end("the ward attached anew")
        attachment = Attachment(
            ward,
            asyncio.Queue(OUTBOUND_MAX),
            asyncio.get_running_loop().create_future(),
            abilities.shared(hello.abilities),
        )
        self._attached[ward] = attachment
        before = self._states.get(ward)
        state = coverage.greeted(
            before, ward, epoch=hello.epoch, version=hello.version[:40], now_us=self._clock()
        )
        if state.lost_note and (before is None or before.lost_note != state.lost_note):
            log.warning("%s attached with a new disk: %s", ward, state.lost_note)
        log.info("%s attached (version %s)", ward, state.version)
        try:
            await self._put(state)
        except BaseException:  # it left again while its state was being written
            await asyncio.shield(self.detach(attachment, "the line was lost"))
            raise
        return attachment

    async def take_over(self, states: Mapping[str, WardState]) -> None:
        """This hub writes the region's store from here on: `states` is what the last one kept. Who is
        attached here has told this hub alone how it stands."""
        own, self._states = self._states, dict(states)
        for ward in self._attached:
            mine = own[ward]
            state = coverage.greeted(
                states.get(ward), ward, epoch=mine.epoch, version=mine.version, now_us=mine.attached_since_us
            )
            if (report := coverage.report_in(mine)) is not None:
                state = coverage.reported(state, report, mine.seen_us)
            self._states[ward] = state
        await asyncio.gather(*(self._put(self._states[ward]) for ward in self._attached))

    async def report(self, ward: str, report: Report) -> None:
        """A report came from a node that is attached."""
        await self._put(coverage.reported(self._state(ward), report, self._clock()))

    def receipted(self, ward: str) -> None:
        """The ward was given a receipt; kept with its next report."""
        self._states[ward] = coverage.receipted(self._state(ward), self._clock())

    async def settle(self, ward: str) -> str:
        """A person, or a reconciliation, settled what the ward's old disk may have lost; what that was, as it
        stood in answers. NotFound for a ward that never reported."""
        state = self._states.get(ward)
        if state is None:
            raise NotFound("no such ward has ever reported")
        if state.lost_note:
            log.warning("%s: settled: %s", ward, state.lost_note)
            await self._put(coverage.cleared(state))
        return state.lost_note

    async def detach(self, attachment: Attachment, reason: str) -> None:
        """The attach ended. Nothing changes for the ward when a newer one has taken its place."""
        attachment.end(reason)
        if self._attached.get(attachment.ward) is not attachment:
            return
        del self._attached[attachment.ward]
        log.info("%s left: %s", attachment.ward, reason)
        await self._put(coverage.departed(self._state(attachment.ward)))

    def end_all(self, reason: str) -> None:
        """The hub stops."""
        for attachment in list(self._attached.values()):
            attachment.end(reason)

    async def ask(self, ward: str, message: Callable[[str], uplink_pb2.HubMessage], deadline_s: float) -> Ask:
        """Sends a question (made by `message` of its id) and waits for the whole answer. Raises an error of
        ours with plain words when there is none within the deadline.
        """
        attachment = self._attached.get(ward)
        if attachment is None:
            raise Unavailable("the ward is away")
        if len(attachment.asks) >= ASKS_MAX:
            raise OutOfResources("too many questions are open at the ward")
        ask = Ask(secrets.token_hex(8), asyncio.get_running_loop().create_future())
        attachment.asks[ask.id] = ask
        try:
            attachment.send(message(ask.id))
            async with asyncio.timeout(deadline_s):
                await ask.done
            return ask
        except TimeoutError:
            raise Unavailable(f"no answer within {deadline_s:g} s") from None
        finally:
            del attachment.asks[ask.id]
            if not ask.done.done() or ask.done.cancelled():
                with contextlib.suppress(MissError):  # the deadline passed, or who asked has left
                    attachment.send(uplink_pb2.HubMessage(cancel=uplink_pb2.CancelAsk(ask_id=ask.id)))
            elif ask.done.exception() is not None:
                log.info("%s did not answer: %s", ward, ask.done.exception())

    def hears(self, ward: str, ask_id: str, size: int) -> bool:
        """Whether this question is open, and a page of so many bytes within the bounds of its answer."""
        attachment = self._attached.get(ward)
        ask = attachment.asks.get(ask_id) if attachment is not None else None
        if ask is None or ask.done.done():
            return False
        ask.bytes += size
        if ask.bytes > ANSWER_BYTES_MAX:
            ask.done.set_exception(OutOfResources("the ward answered past the bounds of an answer"))
            return False
        return True

    def answered(
        self, ward: str, ask_id: str, matches: Iterable[Match], *, last: bool, truncated: bool
    ) -> None:
        """A page of an answer came. One to a question that nobody waits for any more is dropped."""
        attachment = self._attached.get(ward)
        ask = attachment.asks.get(ask_id) if attachment is not None else None
        if ask is None or ask.done.done():
            return
        for match in matches:
            ask.matches.append(match)
            ask.uids += sum(len(holding.sop_instance_uids) for holding in match.holdings)
        ask.truncated = ask.truncated or truncated
        if len(ask.matches) > ANSWER_MATCHES_MAX or ask.uids > ANSWER_MATCHES_MAX:
            ask.done.set_exception(OutOfResources("the ward answered past the bounds of an answer"))
        elif last:
            ask.done.set_result(None)

    def listed(
        self, ward: str, ask_id: str, instances: Sequence[StoredInstance], left_out: int
    ) -> None:
        """A page of a listing came; `answered` says when it was the last."""
        attachment = self._attached.get(ward)
        ask = attachment.asks.get(ask_id) if attachment is not None else None
        if ask is None or ask.done.done():
            return
        ask.listed = [*(ask.listed or ()), *instances]
        ask.left_out = left_out
        if len(ask.listed) > LISTED_MAX:
            ask.done.set_exception(OutOfResources("the ward answered past the bounds of an answer"))

    def failed(self, ward: str, ask_id: str, reason: str) -> None:
        """The ward says that it can't answer."""
        attachment = self._attached.get(ward)
        ask = attachment.asks.get(ask_id) if attachment is not None else None
        if ask is not None and not ask.done.done():
            ask.done.set_exception(Unavailable(reason[: coverage.NOTE_LENGTH_MAX]))

    def come(self, ward: str, *, facts: bool = False, reconcile: bool = False) -> None:
        """Tells a ward that something waits for it here. One that is away asks by itself when it attaches;
        one that takes nothing is told at the next occasion."""
        attachment = self._attached.get(ward)
        if attachment is not None:
            with contextlib.suppress(OutOfResources):
                attachment.send(
                    uplink_pb2.HubMessage(come=uplink_pb2.Come(facts=facts, reconcile=reconcile))
                )

    def lay_down(self, policy: RegionPolicy) -> None:
        """Tells every ward what the region lays down."""
        message = uplink_pb2.HubMessage(policy=serde.policy_to(policy))
        for attachment in self._attached.values():
            with contextlib.suppress(OutOfResources):  # it hears the next
                attachment.send(message)

    def _state(self, ward: str) -> WardState:
        return self._states.get(ward) or coverage.blank(ward)

    async def _put(self, state: WardState) -> None:
        """Keeps the state; it is in the ledger, or can't be, when this returns."""
        self._states[state.ward] = state
        self._unkept.add(state.ward)
        if self._kept is None:
            self._kept = asyncio.get_running_loop().create_future()
        kept = self._kept
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.create_task(self._keep_all())
        await asyncio.shield(kept)

    async def _keep_all(self) -> None:
        while self._kept is not None:
            kept, self._kept = self._kept, None
            states = [self._states[ward] for ward in self._unkept]
            self._unkept.clear()
            try:
                await self._keep(states)
            except Exception as error:  # not ours alone: whoever waits has to be told
                log.error("the states of %d wards can't be kept: %s", len(states), error,
                          exc_info=None if isinstance(error, MissError) else error)  # fmt: skip
            finally:
                if not kept.done():
                    kept.set_result(None)
            await asyncio.sleep(KEEP_GAP_S)
