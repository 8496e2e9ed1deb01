"""The orders that give space back, "evict" and "compact": what a command asks in words, handed to the upkeep,
and what came of it in words. An order that takes long goes on when it is answered. It decides nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from archive.archive import Archive
from archive.errors import InvalidInput
from archive.space.compaction import Compacted
from archive.space.eviction import EvictionReport, EvictionRequest
from archive.space.upkeep import answer_of

log = logging.getLogger(__name__)

EVICT, COMPACT = "evict", "compact"
ANSWER_S = 20.0  # the other orders wait for as long as that


class SpaceOrders:
    """The handlers of one archive's orders. `held` says that nothing may be evicted now: the region may lack
    what it gave receipts for."""

    def __init__(self, archive: Archive, held: Callable[[], bool] = lambda: False) -> None:
        self._archive = archive
        self._held = held

    def evict(self, detail: Mapping[str, str], by: str) -> str:
        """`protected_to_us`, and one of `study`, `received_before_us`, `free_bytes`; perhaps `dry_run`."""
        request = EvictionRequest(
            _number(detail, "protected_to_us"), detail.get("study", ""),
            _number(detail, "received_before_us"), _number(detail, "free_bytes"), "dry_run" in detail,
        )  # fmt: skip
        if self._held() and not request.dry_run:
            raise InvalidInput("nothing is evicted until the node has been compared with the region's store: "
                               "it may lack what it confirmed")  # fmt: skip
        log.info("an eviction was asked by %s", by)
        report = answer_of(self._archive.upkeep.evict(request), ANSWER_S)
        if report is None:
            return "it goes on; `miss packs ls` shows how far it is"
        return _eviction_words(report, dry_run=request.dry_run)

    def compact(self, detail: Mapping[str, str], by: str) -> str:
        """`pack`, its number, or nothing for all that are worth it."""
        number = _number(detail, "pack") or None
        log.info("a compaction was asked by %s", by)
        done = answer_of(self._archive.upkeep.compact(number), ANSWER_S)
        if done is None:
            return "it goes on; `miss packs ls` shows how far it is"
        return _compaction_words(done)


def _number(detail: Mapping[str, str], key: str) -> int:
    try:
        return int(detail.get(key, "0"))
    except ValueError:
        raise InvalidInput(f"{key} is not a number") from None


def _eviction_words(report: EvictionReport, *, dry_run: bool) -> str:
    verb = "would be evicted" if dry_run else "evicted"
    words = [f"{report.instances} instances, {report.bytes} bytes {verb}"]
    if report.kept:
        words.append(f"{report.kept} stay: the region has no protected receipt of them")
    if report.unreadable:
        words.append(f"{report.unreadable} stay: they can't be read; run `miss packs verify`")
    return "; ".join(words)


def _compaction_words(done: list[Compacted]) -> str:
    if not done:
        return "no pack is worth it"
    gone = [each for each in done if not each.reason]
    given_back = sum(each.bytes_given_back for each in gone)
    words = [f"{len(gone)} packs go, {sum(each.moved for each in gone)} records were moved out of them,"
             f" {given_back} bytes come back"]  # fmt: skip
    words += [f"pack {each.number} stays: {each.reason}" for each in done if each.reason]
    return "; ".join(words)
