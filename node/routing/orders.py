"""Owns what people ask of the queue by order: to send what a rule would have taken before it was there, to
try again, to drop. The order desk carries it out, in the node or in a command when none runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from archive.archive import Archive
from archive.errors import InvalidInput, NotFound
from archive.index.described import Described
from archive.ledger import Destination, Ledger, RouteChoice, Routed, RouteKind, RouteState
from archive.orders import Handler
from node.routing.following import merged, routes_of_study
from node.routing.rulefile import read_rules
from node.routing.rules import DAY_US, RETRY_DAYS, Rule, When

APPLY, RETRY, DROP = "routes apply", "routes retry", "routes drop"
_PAGE = 500


class RouteOrders:
    """Every handler is safe to repeat."""

    def __init__(
        self, archive: Archive, ledger: Ledger, ward: str, rules: Path, queue_max: int,
        changed: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`changed` is called when the queue has something that may be sent at once."""
        self._archive = archive
        self._ledger = ledger
        self._ward = ward
        self._rules = rules
        self._queue_max = queue_max
        self._changed = changed

    def handlers(self) -> dict[str, Handler]:
        """By the kind of an order."""
        return {APPLY: self.apply, RETRY: self.retry, DROP: self.drop}

    def apply(self, detail: Mapping[str, str], by: str) -> str:
        """Queue what `rule` takes of what was received at `since_us` or later; what was sent before too when
        `again` is "yes"."""
        rule = next((one for one in read_rules(self._rules) if one.name == detail.get("rule")), None)
        if rule is None:
            raise NotFound(f"no rule of this name in {self._rules}")
        try:
            since_us = int(detail.get("since_us", ""))
        except ValueError:
            raise InvalidInput("since_us is no time") from None
        again = detail.get("again") == "yes"
        self._archive.wait_indexed()
        found = new = 0
        studies: set[str] = set()
        after = ""
        while page := self._archive.index.described_since(since_us, after, _PAGE):
            after = page[-1].stored.head.sop_instance_uid
            for rows in self._rows_of(rule, page, studies):
                if not self._has_room(rule):
                    self._changed()
                    return (f"{new} queued, and then a destination of {rule.name!r} had no room: "
                            "give the same order again later")  # fmt: skip
                if again:
                    self._ledger.forget_sent(rows)
                found += len(rows)
                new += self._ledger.queue_routes(rows)
        self._changed()
        return f"{new} queued; {found - new} were in the queue, or sent, before"

    def retry(self, detail: Mapping[str, str], by: str) -> str:
        """Try what waits and what was set aside now, as if it had just come."""
        now_us = time.time_ns() // 1000
        count = self._ledger.retry_routes(choice_of(detail), now_us, now_us + int(RETRY_DAYS * DAY_US))
        self._changed()
        return f"{count} will be tried now"

    def drop(self, detail: Mapping[str, str], by: str) -> str:
        """Take rows out of the queue, unsent."""
        choice = choice_of(detail)
        if choice == RouteChoice():
            raise InvalidInput("which? A rule, a destination, a study, or what was set aside")
        count = self._ledger.drop_routes(choice)
        self._changed()
        return f"{count} dropped"

    def _rows_of(self, rule: Rule, page: list[Described], studies: set[str]) -> list[list[Routed]]:
        """The rows of a page, in portions that go in together; `studies` are those looked at before."""
        now_us = time.time_ns() // 1000
        if rule.when is When.STORED:
            return [merged([row for one in page if rule.takes(one)
                            for row in rule.routes_of(one, self._ward, now_us)])]  # fmt: skip
        portions = []
        for study_uid in sorted({one.stored.study_uid for one in page} - studies):
            studies.add(study_uid)
            instances = self._archive.index.described_study(study_uid)
            if rule.takes_study(instances):
                portions.append(merged(routes_of_study(rule, study_uid, instances, self._ward, now_us)))
        return portions

    def _has_room(self, rule: Rule) -> bool:
        return all(self._ledger.route_count(to) < self._queue_max for to in rule.to)


def choice_of(detail: Mapping[str, str]) -> RouteChoice:
    """The rows that an order names. Raises InvalidInput for words that name none."""
    choice = RouteChoice(rule=detail.get("rule"), study_uid=detail.get("study"))
    try:
        if "to" in detail:
            kind = RouteKind(detail.get("kind", RouteKind.DEVICE))
            choice = replace(choice, to=Destination(kind, detail["to"]))
        if "state" in detail:
            choice = replace(choice, state=RouteState(detail["state"]))
    except ValueError as error:
        raise InvalidInput(f"no such kind or state: {error}") from None
    return choice
