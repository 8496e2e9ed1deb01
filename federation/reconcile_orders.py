"""The orders "reconcile" and "scrub", at a node and at the hub: what a command asks in words, handed to who
does it, and what came of it in words. It decides nothing. Safe to repeat."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout

from archive.archive import Archive
from archive.errors import NotFound
from archive.ledger import Ledger
from archive.orders import Handler
from archive.space.scrubber import Scrubber
from federation.attachments import Attachments
from federation.reconciling import Reconciling

RECONCILE, SCRUB = "reconcile", "scrub"
ANSWER_S = 20.0  # the other orders wait for as long as that
STARTED = "everything is read again from now on; `miss scrub` shows how far it is"


def handlers_at_node(reconciling: Reconciling, scrubber: Scrubber) -> dict[str, Handler]:
    """For the node that runs."""

    def reconcile(detail: Mapping[str, str], by: str) -> str:
        future = reconciling.ask(dry_run="dry_run" in detail)
        try:
            return future.result(ANSWER_S).words()
        except FutureTimeout:
            return "it goes on; `miss reconcile --last` shows what came of it"

    return {RECONCILE: reconcile, SCRUB: _scrub(scrubber)}


def handlers_at_hub(
    ledger: Ledger, attachments: Attachments, scrubber: Scrubber, loop: asyncio.AbstractEventLoop
) -> dict[str, Handler]:
    """For the hub that runs: it asks the ward, or every ward, to compare. One that is away does so by
    itself, at night or when it finds that the region lacks what it confirmed."""

    def reconcile(detail: Mapping[str, str], by: str) -> str:
        known = [ward.id for ward in ledger.wards()]
        wanted = detail.get("ward", "")
        if wanted and wanted not in known:
            raise NotFound(f"there is no ward {wanted}")
        wards = [wanted] if wanted else known
        for ward in wards:
            loop.call_soon_threadsafe(_come, attachments, ward)
        return f"{len(wards)} asked; `miss reconcile --last` shows what came of it"

    return {RECONCILE: reconcile, SCRUB: _scrub(scrubber)}


def asks_wards(
    archive: Archive, attachments: Attachments, loop: asyncio.AbstractEventLoop
) -> Callable[[Sequence[tuple[str, bytes]]], None]:
    """What the region's scrubber does with what it found: asks those to compare who gave it."""

    def found(contents: Sequence[tuple[str, bytes]]) -> None:
        for ward in archive.index.inventories.holders(contents):
            loop.call_soon_threadsafe(_come, attachments, ward)

    return found


def _come(attachments: Attachments, ward: str) -> None:
    attachments.come(ward, reconcile=True)


def _scrub(scrubber: Scrubber) -> Handler:
    def scrub(detail: Mapping[str, str], by: str) -> str:
        scrubber.now()
        return STARTED

    return scrub
