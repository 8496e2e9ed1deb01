"""The region's end of the comparison of inventories (`reconcile_tree.py`): of the ward that calls, as its
certificate says. It reads, and mends nothing: a node decides what follows, and pushes or fetches.

Bounds: four comparisons at once, each with the sums of its tree (40 MB at most) and the contents of the
leaves that were asked for last; a page of the index at a time. One takes an hour at most, so that a ward that
asks slowly does not keep a place for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from archive.archive import Archive
from archive.errors import InvalidInput, OutOfResources, Unavailable
from archive.index.inventory import Standing
from certs.gate import peer
from federation import serde_inventory as serde
from federation import status
from federation.pools import Pools
from federation.reconcile_notes import Notes, outcome_from
from federation.reconcile_tree import (
    ASK_NODES_MAX,
    FAN_OUT,
    HASH_BYTES,
    SALT_BYTES,
    Content,
    Tree,
    depth_for,
    in_leaves,
)
from protos import inventory_pb2, inventory_pb2_grpc

log = logging.getLogger(__name__)

COMPARISONS_MAX = 4
LEAVES_MAX = 4_096     # in one question: some 200,000 contents
HASHES_MAX = 1 << 19
PAGE_KEYS = 500
QUESTION_WAIT_S = 120.0
COMPARISON_S_MAX = 3_600.0
_STATES = inventory_pb2.ContentStates


class InventoryService(inventory_pb2_grpc.InventoryServicer):
    """Implements `miss.v1.Inventory`."""

    def __init__(self, archive: Archive, pools: Pools, notes: Notes) -> None:
        self._archive = archive
        self._pools = pools
        self._notes = notes
        self._comparing: set[str] = set()

    async def Compare(  # type: ignore[override]
        self, request_iterator: Any, context: Any
    ) -> None:
        ward = peer(context).ward
        if ward in self._comparing or len(self._comparing) >= COMPARISONS_MAX:
            await status.abort(context, OutOfResources("too many comparisons at once"))
        self._comparing.add(ward)
        try:
            # The place is free before the call is ended: its end waits behind what its reader did not take.
            try:
                async with asyncio.timeout(COMPARISON_S_MAX):
                    await self._compare(ward, aiter(request_iterator), context)
            finally:
                self._comparing.discard(ward)
        except TimeoutError:
            await status.abort(context, Unavailable("the comparison took too long"))
        except Exception as error:
            await status.abort(context, error)

    async def Look(self, request: inventory_pb2.ContentKeys, context: Any) -> inventory_pb2.ContentStates:
        try:
            contents = serde.keys_from(request.keys)
            found = await self._pools.work(self._standings, contents)
        except Exception as error:
            await status.abort(context, error)
        return _STATES(states=[_state(found.get(content)) for content in contents])

    async def Describe(
        self, request: inventory_pb2.ContentKeys, context: Any
    ) -> inventory_pb2.SeriesOfContents:
        ward = peer(context).ward
        try:
            contents = serde.keys_from(request.keys)
            described = await self._pools.work(self._archive.index.inventories.described, contents)
            held = await self._pools.work(self._held, ward, contents)
        except Exception as error:
            await status.abort(context, error)
        return serde.series_to(
            [one for one in described if (one.stored.head.sop_instance_uid, one.stored.digest) in held]
        )

    async def Note(
        self, request: inventory_pb2.InventoryOutcome, context: Any
    ) -> inventory_pb2.InventoryNoted:
        ward = peer(context).ward
        try:
            outcome = outcome_from(request.json)
            await self._pools.work(self._notes.note_ward, ward, outcome)
        except Exception as error:
            await status.abort(context, error)
        if outcome.alarms:
            log.error("the comparison with %s: %d contents need a person", ward, outcome.alarms)
        return inventory_pb2.InventoryNoted()

    async def _compare(
        self, ward: str, questions: AsyncIterator[inventory_pb2.InventoryQuestion], context: Any
    ) -> None:
        first = await _next(questions)
        if first is None or first.WhichOneof("question") != "begin" or len(first.begin.salt) != SALT_BYTES:
            raise InvalidInput("a comparison begins with its salt")
        tree = await self._pools.work(self._tree, ward, first.begin.salt, first.begin.count)
        await status.write(context, inventory_pb2.InventoryAnswer(begun=inventory_pb2.InventoryAnswer.Begun(
            depth=tree.depth, count=tree.count, root=serde.sums_to([tree.root])
        )))  # fmt: skip
        while (question := await _next(questions)) is not None:
            kind = question.WhichOneof("question")
            if kind == "split":
                await status.write(context, inventory_pb2.InventoryAnswer(sums=_sums(tree, question.split)))
            elif kind == "leaves":
                leaves, hashes, part = set[int](), set[int](), question.leaves
                while True:
                    told = len(part.hashes) // HASH_BYTES
                    if len(leaves) + len(part.leaves) > LEAVES_MAX or len(hashes) + told > HASHES_MAX:
                        raise InvalidInput("a question about too many leaves")
                    leaves.update(part.leaves)
                    hashes.update(await self._pools.work(serde.sums_from, part.hashes))
                    if part.last:
                        break
                    more = await _next(questions)
                    if more is None or more.WhichOneof("question") != "leaves":
                        raise InvalidInput("a question about leaves did not end")
                    part = more.leaves
                found = await self._pools.work(self._in_leaves, ward, tree, frozenset(leaves))
                await _tell(context, found, hashes)
            else:
                raise InvalidInput("a question that this release does not know")

    def _tree(self, ward: str, salt: bytes, count: int) -> Tree:
        self._archive.wait_indexed()
        inventories = self._archive.index.inventories
        tree = Tree(salt, depth_for(max(count, inventories.count(ward))))
        for page in inventories.of_ward(ward):
            tree.add(page)
        _ = tree.root  # its sums are made here, in the thread
        return tree

    def _in_leaves(self, ward: str, tree: Tree, leaves: frozenset[int]) -> dict[int, Content]:
        found: dict[int, Content] = {}
        for page in self._archive.index.inventories.of_ward(ward):
            found |= in_leaves(tree, page, leaves)
        return found

    def _standings(self, contents: list[Content]) -> dict[Content, Standing]:
        self._archive.wait_indexed()
        return self._archive.index.inventories.standings(contents)

    def _held(self, ward: str, contents: list[Content]) -> set[Content]:
        """Those that came from this ward or are a copy there."""
        return self._archive.index.inventories.held(ward, contents)


async def _next(
    questions: AsyncIterator[inventory_pb2.InventoryQuestion],
) -> inventory_pb2.InventoryQuestion | None:
    async with asyncio.timeout(QUESTION_WAIT_S):
        return await anext(questions, None)


def _sums(tree: Tree, split: inventory_pb2.InventoryQuestion.Split) -> inventory_pb2.InventoryAnswer.Sums:
    level, nodes = split.level, list(split.nodes)
    inside = 0 <= level < tree.depth and len(nodes) <= ASK_NODES_MAX
    if not inside or not all(0 <= node < FAN_OUT**level for node in nodes):
        raise InvalidInput("a question about nodes that the tree does not have")
    return inventory_pb2.InventoryAnswer.Sums(sums=serde.sums_to(tree.children(level, nodes)))


async def _tell(context: Any, found: dict[int, Content], hashes: set[int]) -> None:
    there = [found[value] for value in found.keys() - hashes]
    lacking = sorted(hashes - found.keys())
    answer = inventory_pb2.InventoryAnswer.Differing
    while there or lacking:
        page, there = there[:PAGE_KEYS], there[PAGE_KEYS:]
        values, lacking = lacking[: 8 * PAGE_KEYS], lacking[8 * PAGE_KEYS :]
        await status.write(context, inventory_pb2.InventoryAnswer(
            differing=answer(there=serde.keys_to(page), lacking=serde.sums_to(values))
        ))  # fmt: skip
    await status.write(context, inventory_pb2.InventoryAnswer(differing=answer(last=True)))


def _state(standing: Standing | None) -> Any:
    if standing is None:
        return _STATES.ABSENT
    if standing.removed:
        return _STATES.REMOVED
    return _STATES.WHOLE if standing.whole else _STATES.DAMAGED
