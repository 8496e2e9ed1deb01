"""Routes: what waits for which destination by the routing rules, what was sent, and how far each rule has
looked. A row goes in with the position of the rule that asked for it, in one transaction: nothing is missed
or queued twice, whenever the process ends. It sends nothing and knows no rule but by its name."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    bindparam,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
    update,
)

from archive.database import storable
from archive.ledger.tables import (
    Subject,
    route,
    route_destination,
    route_rule,
    route_sent,
    route_study,
)
from archive.model import START, Position

COMMENT_CHARS_MAX = 200
SENT_FORGOTTEN_MAX = 10_000  # in one transaction
_IN_LIST_MAX = 500


class RouteKind(StrEnum):
    """What a destination is. The values are the ledger's words."""

    DEVICE = "device"  # a device of the node, by C-STORE
    WARD = "ward"      # another ward of the region
    NOTICE = "notice"  # a device that is told of a study, by Instance Availability Notification


class RouteState(StrEnum):
    """Where a row stands. The values are the ledger's words."""

    WAITING = "waiting"
    COMMITTING = "committing"  # it was sent; the destination was asked to commit it
    SET_ASIDE = "set aside"    # given up, with the reason, until a person retries or drops it


@dataclass(frozen=True, slots=True, order=True)
class Destination:
    """Where something is sent: a device's AE title, or a ward's id."""

    kind: RouteKind
    name: str

    def __str__(self) -> str:
        return self.name if self.kind is RouteKind.DEVICE else f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Routed:
    """One instance on its way to one destination; of a notice a whole study, whose `sop_instance_uid` is "".
    `rank` is 0 for what goes first. `status` is the last that a destination gave, 0 when none did."""

    rule: str
    to: Destination
    study_uid: str
    series_uid: str
    sop_instance_uid: str
    digest: bytes
    queued_us: int
    next_try_us: int
    expires_us: int
    rank: int = 1
    commit: bool = False
    state: RouteState = RouteState.WAITING
    tries: int = 0
    status: int = 0
    comment: str = ""
    transaction_uid: str = ""

    @property
    def key(self) -> bytes:
        """The same content goes to the same destination once, whichever rules say so."""
        subject = self.sop_instance_uid or self.study_uid
        text = "\0".join((self.to.kind, self.to.name, subject, self.digest.hex()))
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class RuleMark:
    """How far a rule has looked in the packs of one disk (`epoch`), and since when it is there: what was
    received before is not its."""

    rule: str
    since_us: int
    epoch: bytes = b""
    position: Position = START


@dataclass(frozen=True, slots=True)
class DestinationState:
    """How a destination answered last: how often in a row it failed, and until when it is left alone."""

    to: Destination
    failures: int = 0
    resume_us: int = 0
    error: str = ""
    at_us: int = 0


@dataclass(frozen=True, slots=True)
class RouteSummary:
    """What waits for one destination. `oldest_us` is when the oldest of it was queued."""

    to: Destination
    waiting: int = 0
    committing: int = 0
    set_aside: int = 0
    tries: int = 0
    oldest_us: int | None = None
    state: DestinationState | None = None


@dataclass(frozen=True, slots=True)
class CompleteStudy:
    """A study that was said to be complete, and is not yet looked at by the rules."""

    study_uid: str
    why: str
    at_us: int


@dataclass(frozen=True, slots=True)
class Settlement:
    """What became of rows: those that are `done` leave, the others are written as they are now."""

    done: Sequence[Routed] = ()
    changed: Sequence[Routed] = ()


@dataclass(frozen=True, slots=True)
class RouteChoice:
    """Which rows a person means; what is None leaves nobody out."""

    to: Destination | None = None
    rule: str | None = None
    study_uid: str | None = None
    state: RouteState | None = None

    def conditions(self) -> list[Any]:
        asked: list[Any] = []
        if self.to is not None:
            asked += _of(self.to)
        for column, value in ((route.c.rule, self.rule), (route.c.study_uid, self.study_uid),
                              (route.c.state, self.state)):  # fmt: skip
            if value is not None:
                asked.append(column == value)
        return asked


class Routes(Subject):
    """The queue of one node's routing rules."""

    # What the rules have looked at

    def rule_marks(self) -> dict[str, RuleMark]:
        """By the rule's name."""
        rows = self._database.read(lambda c: c.execute(select(route_rule)).fetchall())
        return {
            row.rule: RuleMark(row.rule, row.since_us, bytes(row.epoch), Position(row.file, row.place))
            for row in rows
        }

    def keep_rules(self, names: Collection[str]) -> None:
        """Forget how far any other rule has looked; what it queued stays."""

        def work(connection: Connection) -> None:
            gone = set(connection.execute(select(route_rule.c.rule)).scalars()) - set(names)
            for name in gone:
                connection.execute(delete(route_rule).where(route_rule.c.rule == name))

        self._database.write(work)

    def note_complete(self, study: CompleteStudy) -> None:
        """A study is complete: kept until `queue_routes` says that the rules have looked at it."""
        row = {"study_uid": study.study_uid, "why": storable(study.why), "at_us": study.at_us}

        def work(connection: Connection) -> None:
            connection.execute(delete(route_study).where(route_study.c.study_uid == study.study_uid))
            connection.execute(insert(route_study).values(row))

        self._database.write(work)

    def complete_studies(self, limit: int, after: CompleteStudy | None = None) -> list[CompleteStudy]:
        """The oldest first, those behind `after`."""
        order = (route_study.c.at_us, route_study.c.study_uid)
        query = select(route_study).order_by(*order).limit(limit)
        if after is not None:
            query = query.where(tuple_(*order) > tuple_(literal(after.at_us), literal(after.study_uid)))
        rows = self._database.read(lambda c: c.execute(query).fetchall())
        return [CompleteStudy(row.study_uid, row.why, row.at_us) for row in rows]

    def has_complete_studies(self) -> bool:
        """Microseconds on SQLite, as it is asked several times a second."""
        return self._database.quick("SELECT 1 FROM route_study LIMIT 1") is not None

    def queue_routes(
        self,
        rows: Sequence[Routed],
        marks: Sequence[RuleMark] = (),
        studies: Sequence[CompleteStudy] = (),
    ) -> int:
        """Queue rows, move the marks of the rules that asked for them, and forget studies that were looked
        at, in one transaction. What is in the queue or was sent is left as it is. How many were new."""
        by_key: dict[bytes, Routed] = {}
        for row in rows:
            by_key.setdefault(row.key, row)

        def work(connection: Connection) -> int:
            known: set[bytes] = set()
            for keys in _pieces(by_key):
                known |= _there(connection, route.c.id, keys) | _there(connection, route_sent.c.id, keys)
            new = [row for key, row in by_key.items() if key not in known]
            if new:
                connection.execute(insert(route), [_row(row) for row in new])
            _list_destinations(connection, {row.to for row in new})
            for mark in marks:
                connection.execute(delete(route_rule).where(route_rule.c.rule == mark.rule))
                connection.execute(insert(route_rule).values(
                    rule=mark.rule, since_us=mark.since_us, epoch=mark.epoch,
                    file=mark.position.file, place=mark.position.offset,
                ))  # fmt: skip
            for study in studies:
                connection.execute(delete(route_study).where(
                    route_study.c.study_uid == study.study_uid, route_study.c.at_us == study.at_us
                ))  # fmt: skip
            return len(new)

        return self._database.write(work)

    # What waits

    def destinations_of_routes(self) -> list[DestinationState]:
        """Every destination for which anything was ever queued."""
        rows = self._database.read(lambda c: c.execute(select(route_destination)).fetchall())
        return sorted((_state_of(row) for row in rows), key=lambda one: one.to)

    def due_routes(
        self, to: Destination, now_us: int, limit: int, state: RouteState = RouteState.WAITING
    ) -> list[Routed]:
        """What may be sent by now, and what was never put off, also when the clock was set back since it was
        queued: what ranks first, then the oldest."""
        query = (
            select(route)
            .where(*_of(to), route.c.state == state,
                   or_(route.c.next_try_us <= now_us, route.c.next_try_us == route.c.queued_us))
            .order_by(route.c.rank, route.c.queued_us, route.c.id)
            .limit(limit)
        )
        return [_routed(row) for row in self._database.read(lambda c: c.execute(query).fetchall())]

    def next_route_us(self, to: Destination) -> int | None:
        """When the next row of a destination may be looked at; None when nothing waits for it."""
        row = self._database.quick(
            "SELECT MIN(next_try_us) FROM route WHERE kind = ? AND destination = ?"
            " AND state IN ('waiting', 'committing')",
            (str(to.kind), to.name),
        )
        return None if row is None or row[0] is None else int(row[0])

    def route_count(self, to: Destination) -> int:
        """How many rows a destination has, those set aside too."""
        row = self._database.quick(
            "SELECT COUNT(*) FROM route WHERE kind = ? AND destination = ?", (str(to.kind), to.name)
        )
        return int(row[0])

    def postpone_routes(self, to: Destination, rule: str, until_us: int) -> None:
        """The rule's window is closed: none of its rows is looked at before `until_us`."""
        self._database.write(lambda c: c.execute(
            update(route)
            .where(*_of(to), route.c.rule == rule, route.c.state == RouteState.WAITING,
                   route.c.next_try_us < until_us)
            .values(next_try_us=until_us)
        ))  # fmt: skip

    def settle_routes(self, settlement: Settlement, now_us: int) -> None:
        """Write what became of rows. What is done is remembered as sent, so that it is not sent again; a row
        that a person dropped meanwhile stays dropped."""
        changes = [
            {"b_id": row.key, "b_state": str(row.state), "b_tries": row.tries, "b_next": row.next_try_us,
             "b_status": row.status, "b_comment": storable(row.comment)[:COMMENT_CHARS_MAX],
             "b_transaction": row.transaction_uid, "b_expires": row.expires_us}
            for row in settlement.changed
        ]  # fmt: skip
        done = [row.key for row in settlement.done]

        def work(connection: Connection) -> None:
            if changes:
                connection.execute(_CHANGE, changes)
            for keys in _pieces(done):
                known = _there(connection, route_sent.c.id, keys)
                connection.execute(delete(route).where(route.c.id.in_(keys)))
                new = [{"id": key, "at_us": now_us} for key in keys if key not in known]
                if new:
                    connection.execute(insert(route_sent), new)

        if changes or done:
            self._database.write(work)

    def note_destination(self, state: DestinationState) -> None:
        """How a destination answered."""
        values = {"failures": state.failures, "resume_us": state.resume_us, "at_us": state.at_us,
                  "error": storable(state.error)[:COMMENT_CHARS_MAX]}  # fmt: skip

        def work(connection: Connection) -> None:
            _list_destinations(connection, {state.to})
            connection.execute(update(route_destination).where(*_named(state.to)).values(values))

        self._database.write(work)

    def forget_sent(self, rows: Iterable[Routed]) -> None:
        """Let what was sent be queued once more."""
        keys = [row.key for row in rows]

        def work(connection: Connection) -> None:
            for some in _pieces(keys):
                connection.execute(delete(route_sent).where(route_sent.c.id.in_(some)))

        if keys:
            self._database.write(work)

    def trim_sent(self, before_us: int) -> int:
        """Forget what was sent before a moment, a bounded part at once; how many that were."""

        def work(connection: Connection) -> int:
            old = (select(route_sent.c.id).where(route_sent.c.at_us < before_us)
                   .order_by(route_sent.c.at_us).limit(SENT_FORGOTTEN_MAX))  # fmt: skip
            return connection.execute(
                delete(route_sent).where(route_sent.c.id.in_(old.scalar_subquery()))
            ).rowcount

        return self._database.write(work)

    # What people see and do

    def route_summaries(self) -> list[RouteSummary]:
        """What waits, destination by destination; those for which nothing does are left out unless they
        fail."""
        query = select(
            route.c.kind, route.c.destination, route.c.state, func.count().label("count"),
            func.min(route.c.queued_us).label("oldest"), func.max(route.c.tries).label("tries"),
        ).group_by(route.c.kind, route.c.destination, route.c.state)  # fmt: skip
        rows, states = self._database.read(lambda c: (
            c.execute(query).fetchall(), c.execute(select(route_destination)).fetchall()))  # fmt: skip
        known = {one.to: one for one in map(_state_of, states)}
        found: dict[Destination, dict[str, Any]] = {}
        for row in rows:
            to = Destination(RouteKind(row.kind), row.destination)
            found.setdefault(to, {})[row.state] = row
        summaries = []
        for to in sorted(set(found) | {to for to, one in known.items() if one.failures}):
            by_state = found.get(to, {})
            oldest = [row.oldest for name, row in by_state.items() if name != RouteState.SET_ASIDE]
            count = {name: int(by_state[name].count) if name in by_state else 0 for name in RouteState}
            summaries.append(RouteSummary(
                to,
                count[RouteState.WAITING], count[RouteState.COMMITTING], count[RouteState.SET_ASIDE],
                tries=max((row.tries for row in by_state.values()), default=0),
                oldest_us=min(oldest, default=None),
                state=known.get(to),
            ))  # fmt: skip
        return summaries

    def routes(self, limit: int, choice: RouteChoice | None = None) -> list[Routed]:
        """Rows as they stand: what ranks first, then the oldest."""
        query = select(route).where(*(choice or RouteChoice()).conditions())
        query = query.order_by(route.c.rank, route.c.queued_us, route.c.id).limit(limit)
        return [_routed(row) for row in self._database.read(lambda c: c.execute(query).fetchall())]

    def retry_routes(self, choice: RouteChoice, now_us: int, expires_us: int) -> int:
        """Rows that wait, or were set aside, are tried now, as if they had come now; how many."""
        values = {"state": str(RouteState.WAITING), "tries": 0, "next_try_us": now_us,
                  "expires_us": expires_us}  # fmt: skip
        where = [*choice.conditions(), route.c.state != RouteState.COMMITTING]

        def work(connection: Connection) -> int:
            of = [] if choice.to is None else _named(choice.to)
            connection.execute(update(route_destination).where(*of).values(failures=0, resume_us=0))
            return connection.execute(update(route).where(*where).values(values)).rowcount

        return self._database.write(work)

    def drop_routes(self, choice: RouteChoice) -> int:
        """Rows leave the queue unsent; how many. They are not remembered as sent."""
        where = choice.conditions()
        return self._database.write(lambda c: c.execute(delete(route).where(*where)).rowcount)


_CHANGE = (
    update(route)
    .where(route.c.id == bindparam("b_id"))
    .values(state=bindparam("b_state"), tries=bindparam("b_tries"), next_try_us=bindparam("b_next"),
            status=bindparam("b_status"), comment=bindparam("b_comment"),
            transaction_uid=bindparam("b_transaction"), expires_us=bindparam("b_expires"))
)  # fmt: skip


def _list_destinations(connection: Connection, wanted: set[Destination]) -> None:
    for to in wanted:
        if connection.execute(select(route_destination.c.kind).where(*_named(to))).fetchone() is None:
            connection.execute(insert(route_destination).values(
                kind=str(to.kind), name=to.name, failures=0, resume_us=0, at_us=0, error=""))  # fmt: skip


def _of(to: Destination) -> list[Any]:
    return [route.c.kind == str(to.kind), route.c.destination == to.name]


def _named(to: Destination) -> list[Any]:
    return [route_destination.c.kind == str(to.kind), route_destination.c.name == to.name]


def _there(connection: Connection, column: Column[Any], keys: list[bytes]) -> set[bytes]:
    return {bytes(key) for key in connection.execute(select(column).where(column.in_(keys))).scalars()}


def _pieces(keys: Iterable[bytes]) -> Iterable[list[bytes]]:
    ordered = list(keys)
    for start in range(0, len(ordered), _IN_LIST_MAX):
        yield ordered[start : start + _IN_LIST_MAX]


def _row(row: Routed) -> dict[str, Any]:
    return {
        "id": row.key, "rule": storable(row.rule), "kind": str(row.to.kind), "destination": row.to.name,
        "study_uid": row.study_uid, "series_uid": row.series_uid, "sop_instance_uid": row.sop_instance_uid,
        "digest": row.digest, "queued_us": row.queued_us, "next_try_us": row.next_try_us,
        "expires_us": row.expires_us, "rank": row.rank, "ask_commit": row.commit, "state": str(row.state),
        "tries": row.tries, "status": row.status, "comment": storable(row.comment)[:COMMENT_CHARS_MAX],
        "transaction_uid": row.transaction_uid,
    }  # fmt: skip


def _routed(row: Any) -> Routed:
    return Routed(
        rule=row.rule, to=Destination(RouteKind(row.kind), row.destination), study_uid=row.study_uid,
        series_uid=row.series_uid, sop_instance_uid=row.sop_instance_uid, digest=bytes(row.digest),
        queued_us=row.queued_us, next_try_us=row.next_try_us, expires_us=row.expires_us, rank=row.rank,
        commit=bool(row.ask_commit), state=RouteState(row.state), tries=row.tries, status=row.status,
        comment=row.comment, transaction_uid=row.transaction_uid,
    )  # fmt: skip


def _state_of(row: Any) -> DestinationState:
    to = Destination(RouteKind(row.kind), row.name)
    return DestinationState(to, row.failures, row.resume_us, row.error, row.at_us)
