"""One comparison of a node with the region: what differs, looked at once more on both sides, and what is done
about it. `reconciling.py` says when; it keeps nothing, and every step is safe to repeat."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import grpc.aio

from archive.archive import Archive
from archive.errors import Unavailable
from archive.index.inventory import Standing
from archive.model import Fact, FactKind
from federation import serde_inventory as serde
from federation.line import Line
from federation.reconcile_notes import ALARMS_MAX, Alarm, Outcome
from federation.reconcile_tree import SALT_BYTES, Content, Descent, Tree, in_leaves
from federation.restoring import Restoring
from protos import inventory_pb2
from protos.inventory_pb2_grpc import InventoryStub

if TYPE_CHECKING:
    from protos.inventory_pb2_grpc import InventoryAsyncStub  # a type of the stubs alone

log = logging.getLogger(__name__)

PAGE = 500
DESCRIBED_PAGE = 200
LEAVES = 2_000          # asked for at once: some 100,000 contents, in memory at both ends
HASHES = 8_000          # in one message
CALL_S = 60.0
COMPARE_S = 600.0       # for one answer: the region reads through what it has of the ward
REFILL_MAX = 200_000
_STATE = inventory_pb2.ContentStates


class Pool(Protocol):
    """Runs what touches the archive in a thread."""

    def __call__(self, function: Callable[..., Any], *args: Any) -> Awaitable[Any]: ...


class Comparison:
    """One comparison, and what came of it so far."""

    def __init__(
        self,
        archive: Archive,
        ward: str,
        line: Line,
        outcome: Outcome,
        *,
        restoring: Restoring,
        clock: Callable[[], int],
        in_pool: Pool,
        refill_days: float,
    ) -> None:
        self._archive = archive
        self._ward = ward
        self._line = line
        self._restoring = restoring
        self._clock = clock
        self._in_pool = in_pool
        self._refill_us = int(refill_days * 86_400e6)
        self.outcome = outcome
        self._recent: list[Content] = []

    # Comparing

    async def compare(self) -> None:
        salt = os.urandom(SALT_BYTES)
        count = await self._in_pool(self._archive.index.inventories.count)
        call: Any = stub_of(self._line).Compare()
        try:
            begin = inventory_pb2.InventoryQuestion.Begin(salt=salt, count=count)
            begun = (await _asked(call, inventory_pb2.InventoryQuestion(begin=begin))).begun
            tree = await self._in_pool(self._tree, salt, begun.depth)
            (root,) = serde.sums_from(begun.root)
            self.outcome = replace(self.outcome, here=tree.count, there=begun.count)
            descent = Descent(tree, root)
            while (question := descent.question()) is not None:
                split = inventory_pb2.InventoryQuestion.Split(level=question[0], nodes=question[1])
                sums = (await _asked(call, inventory_pb2.InventoryQuestion(split=split))).sums
                descent.answer(serde.sums_from(sums.sums))
            for start in range(0, len(descent.leaves), LEAVES):
                await self._mend_leaves(call, tree, descent.leaves[start : start + LEAVES])
            await call.done_writing()
        finally:
            call.cancel()

    async def _mend_leaves(self, call: Any, tree: Tree, leaves: Sequence[int]) -> None:
        own = await self._in_pool(self._in_leaves, tree, frozenset(leaves))
        hashes = sorted(own)
        ask = inventory_pb2.InventoryQuestion.Leaves
        for start in range(0, max(len(hashes), 1), HASHES):
            page = hashes[start : start + HASHES]
            last = start + HASHES >= len(hashes)
            question = ask(leaves=leaves if last else (), hashes=serde.sums_to(page), last=last)
            await call.write(inventory_pb2.InventoryQuestion(leaves=question))
        async for there, lacking in _differing(call):
            await self._region_lacks([own[value] for value in lacking if value in own])
            await self._lacked_here(there)

    def _tree(self, salt: bytes, depth: int) -> Tree:
        tree = Tree(salt, depth)
        for page in self._archive.index.inventories.confirmed():
            tree.add(page)
        return tree

    def _in_leaves(self, tree: Tree, leaves: frozenset[int]) -> dict[int, Content]:
        found: dict[int, Content] = {}
        for page in self._archive.index.inventories.confirmed():
            found |= in_leaves(tree, page, leaves)
        return found

    # Mending

    async def _region_lacks(self, contents: Sequence[Content]) -> None:
        """The node has a receipt for these, and the region seems not to have them whole."""
        for page in _pages(contents, PAGE):
            self._add(differing=len(page))
            states = await look(self._line, page)
            here = await self._in_pool(self._standings, page)
            lost: list[Content] = []
            for content in page:
                state, standing = states[content], here.get(content)
                settled = state in (_STATE.WHOLE, _STATE.REMOVED) or standing is None
                if standing is None or settled or not standing.receipt_us or standing.removed:
                    self._add(settled=1)
                elif standing.whole:
                    lost.append(content)
                elif standing.evicted:
                    self._alarm(content, "the region does not have it whole, and it was evicted here")
                else:
                    self._add(settled=1)  # damaged here meanwhile: looked at with what is damaged
            self._add(pushed=len(lost))
            await self._record([self._fact(FactKind.LOST, content) for content in lost])

    async def _lacked_here(self, contents: Sequence[Content]) -> None:
        """The region has these of this ward, and they are not among what is whole and confirmed here."""
        for page in _pages(contents, DESCRIBED_PAGE):
            self._add(differing=len(page))
            states = await look(self._line, page)
            here = await self._in_pool(self._standings, page)
            wanted = [content for content in page
                      if content not in here and states[content] == _STATE.WHOLE]  # fmt: skip
            # What stands here is pending, removed, purged, whole by now, or damaged: that comes after this.
            self._add(settled=len(page) - len(wanted))
            if wanted:
                await self._list(wanted)

    async def _list(self, contents: Sequence[Content]) -> None:
        """The live ones are listed as evicted; what is kept beside another content is brought."""
        request = inventory_pb2.ContentKeys(keys=serde.keys_to(contents))
        reply = await stub_of(self._line).Describe(request, timeout=CALL_S)
        wanted, now_us = set(contents), self._clock()
        entries = {}
        for entry in serde.entries_from(reply, ward=self._ward):
            content = (entry.record.head.sop_instance_uid, entry.record.digest)
            known = self._archive.index.lookup(content[0])
            if content in wanted and known is None:
                entries[content] = entry
        receipts = [self._fact(FactKind.RECEIPT, content) for content in entries]
        evicted = [replace(self._fact(FactKind.EVICTED, content), entry=entry)
                   for content, entry in entries.items()]  # fmt: skip
        self._add(listed=len(entries))
        await self._record([*receipts, *evicted])
        oldest_us = now_us - self._refill_us
        self._recent += [content for content, entry in entries.items()
                         if entry.record.head.provenance.received_at_us >= oldest_us]  # fmt: skip
        del self._recent[REFILL_MAX:]
        beside = [content for content in contents if content not in entries]
        await self._bring(beside, "the region has it, under a UID that has another content here")
        if not self.outcome.dry_run:
            for content in beside:
                await self._record([self._fact(FactKind.RECEIPT, content)])

    async def mend_damaged(self) -> None:
        """What is damaged here, whether or not the comparison saw it."""
        damaged = await self._in_pool(
            lambda: [content for page in self._archive.index.inventories.damaged() for content in page]
        )
        for page in _pages(damaged, PAGE):
            states = await look(self._line, page)
            whole = [content for content in page if states[content] == _STATE.WHOLE]
            for content in page:
                if states[content] in (_STATE.ABSENT, _STATE.DAMAGED):
                    self._alarm(content, "it is damaged here, and the region does not have it whole")
            await self._bring(whole, "it is damaged here, and the region could not give it back")

    async def refill(self) -> None:
        """What a new disk gets back first: what was received lately."""
        if self.outcome.dry_run:
            return
        for page in _pages(self._recent, PAGE):
            self._add(brought=len(await self._restoring.bring(page)))

    async def _bring(self, contents: Sequence[Content], words: str) -> None:
        if not contents or self.outcome.dry_run:
            self._add(brought=len(contents))
            return
        came = await self._restoring.bring(contents)
        self._add(brought=len(came))
        for content in contents:
            if content not in came:
                self._alarm(content, words)

    # Small things

    def _standings(self, contents: Iterable[Content]) -> dict[Content, Standing]:
        self._archive.wait_indexed()
        return self._archive.index.inventories.standings(contents)

    def _fact(self, kind: FactKind, content: Content) -> Fact:
        return Fact(kind, *content, self._ward, self._clock())

    async def _record(self, facts: Sequence[Fact]) -> None:
        if facts and not self.outcome.dry_run:
            await self._in_pool(self._archive.record_facts, facts)

    def _add(self, **counts: int) -> None:
        self.outcome = replace(
            self.outcome, **{name: getattr(self.outcome, name) + count for name, count in counts.items()}
        )

    def _alarm(self, content: Content, words: str) -> None:
        log.error("%s needs a person: %s", content[0], words)
        self._add(alarms=1)
        if len(self.outcome.listed_alarms) < ALARMS_MAX:
            alarm = Alarm(content[0], content[1].hex(), words)
            self.outcome = replace(self.outcome, listed_alarms=(*self.outcome.listed_alarms, alarm))


async def look(line: Line, contents: Sequence[Content]) -> dict[Content, int]:
    """How these stand in the region."""
    found: dict[Content, int] = {}
    for page in _pages(contents, PAGE):
        reply = await stub_of(line).Look(inventory_pb2.ContentKeys(keys=serde.keys_to(page)), timeout=CALL_S)
        if len(reply.states) != len(page):
            raise Unavailable("the hub does not say how each content stands")
        found |= dict(zip(page, reply.states, strict=True))
    return found


def stub_of(line: Line) -> InventoryAsyncStub:
    stub: InventoryAsyncStub = InventoryStub(line.channel)
    return stub


async def _asked(call: Any, question: inventory_pb2.InventoryQuestion) -> inventory_pb2.InventoryAnswer:
    await call.write(question)
    return await _read(call)


async def _read(call: Any) -> inventory_pb2.InventoryAnswer:
    async with asyncio.timeout(COMPARE_S):
        answer = await call.read()
    if answer is grpc.aio.EOF:
        raise Unavailable("the hub ended the comparison")
    told: inventory_pb2.InventoryAnswer = answer
    return told


async def _differing(call: Any) -> AsyncIterator[tuple[list[Content], list[int]]]:
    while True:
        answer = (await _read(call)).differing
        there = serde.keys_from(answer.there)
        yield there, serde.sums_from(answer.lacking)
        if answer.last:
            return


def _pages(contents: Sequence[Content], size: int) -> Iterable[Sequence[Content]]:
    return (contents[start : start + size] for start in range(0, len(contents), size))
