"""A node's answers to what the hub asks of it on behalf of a reader. The node verifies who asks and decides
for itself, by the same function as the portal: a hub that asks for more than the reader may see gets no
more. Who was answered is in the node's own audit log first, under the question's correlation id.

Bounds: 16 questions at once; an answer lists at most 1,000 pending instances, in messages of about 256 KB.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import grpc.aio
from opentelemetry.trace import SpanKind

from archive.archive import Archive
from archive.errors import Forbidden, MissError, OutOfResources
from archive.ledger import AuditRow
from archive.model import Level, Match, Query, Scope
from certs.identity import Identity
from federation import serde
from federation.assertion import verify
from federation.coverage import Report
from federation.fanout import PENDING_UIDS_MAX
from federation.gathering import LISTED_MAX
from federation.paging import pages_of
from federation.policy import Act, decide, narrowed
from federation.serde_gathering import listed_to
from monitoring.tracing import carried, metadata, span
from protos import common_pb2, uplink_pb2

if TYPE_CHECKING:
    from protos.uplink_pb2_grpc import UplinkAsyncStub  # a type of the stubs alone

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

ASKS_MAX = 16
SUBJECT_CHARS_MAX = 2_000

MakeReport = Callable[[], Awaitable[Report]]
Fail = Callable[[str, str], None]
Audit = Callable[[AuditRow], None]


class Asks:
    """The questions that are open at this node. `hub_clock` is the hub's time, as far as it is known here: a
    ward whose clock is wrong is not deaf.
    """

    def __init__(
        self,
        archive: Archive,
        identity: Identity,
        pool: Executor,
        hub_clock: Callable[[], int],
        report: MakeReport,
        on_urgent: Callable[[], None],
        audit: Audit | None = None,
    ) -> None:
        self._archive = archive
        self._identity = identity
        self._pool = pool
        self._hub_clock = hub_clock
        self._report = report
        self._on_urgent = on_urgent
        self._audit = audit
        self._open: dict[str, asyncio.Task[None]] = {}

    def search(self, ask: uplink_pb2.SearchAsk, stub: UplinkAsyncStub, fail: Fail) -> None:
        """Begins to answer; `fail` is told the ask's id and why when it can't be."""
        self._begin(ask.ask_id, "search", ask.traceparent, lambda: self._answer_search(ask, stub), fail)

    def promote(self, ask: uplink_pb2.PromoteAsk, stub: UplinkAsyncStub, fail: Fail) -> None:
        """Marks the study (or the one instance) urgent, and answers with what of it is pending."""
        self._begin(ask.ask_id, "promote", ask.traceparent, lambda: self._answer_promote(ask, stub), fail)

    def cancel(self, ask_id: str) -> None:
        """Nobody waits for this answer any more."""
        if (task := self._open.get(ask_id)) is not None:
            task.cancel()

    def cancel_all(self) -> None:
        for task in self._open.values():
            task.cancel()

    def _begin(
        self, ask_id: str, name: str, parent: str, answer: Callable[[], Awaitable[None]], fail: Fail
    ) -> None:
        async def run() -> None:
            with span(name, parent, kind=SpanKind.SERVER, ward=self._identity.ward):
                try:
                    if len(self._open) > ASKS_MAX:
                        raise OutOfResources("the ward has too many questions open")
                    await answer()
                except MissError as error:
                    fail(ask_id, str(error))
                except grpc.aio.AioRpcError as error:
                    log.info("an answer was not taken: %s %s", error.code().name, error.details())
                except Exception:
                    log.exception("a question could not be answered")
                    fail(ask_id, "an unexpected error at the ward")
                finally:
                    self._open.pop(ask_id, None)

        self._open[ask_id] = asyncio.create_task(run())

    async def _answer_search(self, ask: uplink_pb2.SearchAsk, stub: UplinkAsyncStub) -> None:
        query = serde.query_from(ask.query)
        criteria = {"level": query.level.value} | {keyword: value for keyword, value in query.keys if value}
        scope = await self._in_pool(self._scope, ask.assertion, Act.SEARCH, criteria)
        own = Scope(frozenset({self._identity.ward}))
        asked = replace(
            query,
            scope=narrowed(narrowed(query.scope, scope), own),
            pending_only=True,
            limit=PENDING_UIDS_MAX,
            offset=0,
        )
        await self._answer(ask.ask_id, await self._in_pool(self._archive.search, asked), stub)

    async def _answer_promote(self, ask: uplink_pb2.PromoteAsk, stub: UplinkAsyncStub) -> None:
        subject = {"StudyInstanceUID": ask.study_uid} | (
            {"SOPInstanceUID": ask.sop_instance_uid} if ask.sop_instance_uid else {}
        )
        await self._in_pool(self._scope, ask.assertion, Act.READ, subject)
        # Marked before it is listed: what is listed is urgent already.
        marked = await self._in_pool(
            self._archive.index.mark_urgent, ask.study_uid, ask.sop_instance_uid or None
        )
        if marked:
            self._on_urgent()
        await (self._list(ask, stub) if ask.listing else self._match(ask, stub))

    async def _match(self, ask: uplink_pb2.PromoteAsk, stub: UplinkAsyncStub) -> None:
        """What of it is pending, as matches: to a hub that knows of no listing."""
        keys, level = [("StudyInstanceUID", ask.study_uid)], Level.STUDY
        if ask.sop_instance_uid:
            keys.append(("SOPInstanceUID", ask.sop_instance_uid))
            level = Level.IMAGE
        query = Query(level, tuple(keys), pending_only=True, limit=PENDING_UIDS_MAX)
        await self._answer(ask.ask_id, await self._in_pool(self._archive.search, query), stub)

    async def _list(self, ask: uplink_pb2.PromoteAsk, stub: UplinkAsyncStub) -> None:
        """What of it is pending, instance by instance: it can be read while it arrives."""
        await self._in_pool(self._archive.wait_indexed)
        found, aside = await self._in_pool(
            self._archive.index.pending_of, ask.study_uid, ask.sop_instance_uid or None, LISTED_MAX + 1
        )
        report = serde.report_to(await self._report())
        pages = list(pages_of(map(listed_to, found[:LISTED_MAX]))) or [[]]
        for number, page in enumerate(pages, 1):
            last = number == len(pages)
            await stub.Answer(
                uplink_pb2.SearchAnswer(
                    ask_id=ask.ask_id,
                    listed=page,
                    lists=True,
                    left_out=aside,
                    last=last,
                    truncated=last and len(found) > LISTED_MAX,
                    report=report if last else None,
                ),
                metadata=metadata(),
            )

    def _scope(self, assertion: common_pb2.Assertion, act: Act, subject: Mapping[str, str]) -> Scope:
        """What the person or device that asks may see here, by an assertion that holds; audited, or it is
        not answered."""
        signed = serde.assertion_from(assertion)
        now_us = self._hub_clock()
        principal = verify(signed, self._identity.roots_pem, self._identity.region, now_us)
        decision = decide(principal, act)
        if not decision.allowed or not decision.scope.allows(self._identity.ward):
            raise Forbidden("this reader may not see what this ward holds")
        if self._audit is not None:
            self._audit(
                AuditRow(
                    at_us=now_us,
                    who=principal.user,
                    role=principal.role.value,
                    ward=principal.ward or "",
                    act=act.value,
                    subject=json.dumps(subject, ensure_ascii=True)[:SUBJECT_CHARS_MAX],
                    outcome="ok",
                    correlation=signed.correlation,
                )
            )
        return decision.scope

    async def _answer(self, ask_id: str, matches: Sequence[Match], stub: UplinkAsyncStub) -> None:
        report = serde.report_to(await self._report())
        pending = sum(match.instance_count for match in matches)
        matches = cut_to(matches, PENDING_UIDS_MAX)
        listed = sum(len(holding.sop_instance_uids) for match in matches for holding in match.holdings)
        truncated = listed < pending or len(matches) >= PENDING_UIDS_MAX
        pages = list(pages_of(map(serde.match_to, matches))) or [[]]
        for number, page in enumerate(pages, 1):
            last = number == len(pages)
            await stub.Answer(
                uplink_pb2.SearchAnswer(
                    ask_id=ask_id,
                    matches=page,
                    last=last,
                    truncated=truncated and last,
                    report=report if last else None,
                ),
                metadata=metadata(),
            )

    def _in_pool(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._pool, carried(function, *args, **kwargs))


def cut_to(matches: Sequence[Match], most: int) -> Sequence[Match]:
    """The matches with at most so many UIDs in all, the first ones in full as far as there is room; each
    match keeps one, so that none of at most so many is missing from an answer that is cut."""
    spare = most - len(matches)
    cut = []
    for match in matches:
        room, holdings = 1 + max(spare, 0), []
        for holding in match.holdings:
            if uids := holding.sop_instance_uids[:room]:
                holdings.append(replace(holding, sop_instance_uids=uids))
                room -= len(uids)
        kept = sum(len(holding.sop_instance_uids) for holding in holdings)
        spare -= max(kept - 1, 0)
        is_cut = kept < sum(len(holding.sop_instance_uids) for holding in match.holdings)
        cut.append(replace(match, holdings=tuple(holdings), truncated=match.truncated or is_cut))
    return cut
