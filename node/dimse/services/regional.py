"""Owns what a search of a device that looks into the whole region answers: this node's matches and the
region's joined, and whether the answer lacks a ward (F8). It asks through the node's window, and decides
nothing about who may look: the region does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from archive.errors import Unavailable
from archive.model import Match, Query
from federation.coverage import WardCoverage, lacking
from federation.fanout import with_own
from federation.policy import Principal
from federation.source import Answer
from node.dimse.exchange import Caller

log = logging.getLogger(__name__)


class SearchWindow(Protocol):
    """What is needed of a node's window on the region (`federation/window.py`)."""

    def clock_us(self) -> int: ...

    def search(self, principal: Principal, query: Query) -> Answer: ...


@dataclass(frozen=True, slots=True)
class Widened:
    """The matches of ward and region, and which wards they lack."""

    matches: list[Match]
    lacking: Sequence[WardCoverage] = ()

    def comment(self, caller: Caller) -> str:
        """What the final response says besides, "" when nothing is missing. Raises Unavailable where the
        device is to be told that its search failed."""
        if not self.lacking:
            return ""
        words = missing_words(self.lacking)
        if caller.on_incomplete == "fail":
            raise Unavailable(words)
        log.warning("C-FIND of %s is answered all the same: %s", caller.ae_title, "; ".join(
            f"{one.title or one.ward}: {one.reason or one.state.value}" for one in self.lacking))
        return words


def widened(window: SearchWindow, principal: Principal, caller: Caller, query: Query,
            own: Sequence[Match]) -> Widened:
    """`own`, which this node's archive found, joined with what the region finds."""
    answer = window.search(principal, query)
    matches = with_own(query.level, answer.matches, own, limit=query.limit)
    return Widened(matches, lacking(answer.coverage, window.clock_us(), caller.max_age_s))


def missing_words(lacking: Sequence[WardCoverage]) -> str:
    """For an Error Comment, which holds 64 characters: how many, and as many names as fit."""
    if not any(one.ward for one in lacking):
        return "the region does not answer: this ward alone"
    count = f"{len(lacking)} ward{'' if len(lacking) == 1 else 's'} missing"
    return f"{count}: {', '.join(one.title or one.ward for one in lacking)}"
