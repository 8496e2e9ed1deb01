"""Deliveries: what one ward handed over to another, in the region's ledger from the order until the other has
it. A delivery is named by the two wards, the SOP Instance UID and the digest, so that ordering again changes
nothing. A node's ledger keeps only how its deliveries stood when the hub told it last. It moves no image and
knows no policy."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    case,
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
from archive.errors import InvalidInput, OutOfResources
from archive.ledger.audit import AuditRow
from archive.ledger.tables import Subject, as_row, audit, delivery, delivery_told, log_key

ORDER_MAX = 1_000          # instances in one order
PAGE_MAX = 1_000           # rows in one question
OPEN_MAX = 100_000         # deliveries of one ward to another that are not over
TRIES_MAX = 30             # with the pauses between them: about a day
PAUSE_FIRST_US = 5_000_000
PAUSE_MAX_US = 3_600_000_000
KEPT_US = 30 * 86_400 * 1_000_000  # how long one may stay open, and how long it is known after that
DAY_US = 86_400 * 1_000_000
REASON_CHARS_MAX = 200
_IN_LIST_MAX = 200


class DeliveryState(StrEnum):
    """Where a delivery stands. The values are the ledger's words."""

    AWAITED = "awaited"      # the region does not hold it yet
    READY = "ready"          # the ward may fetch it
    DELIVERED = "delivered"  # durable at the ward
    FAILED = "failed"        # given up, with the reason, until it is ordered again or a person retries it


OPEN = (DeliveryState.AWAITED, DeliveryState.READY)
NOT_DELIVERED = (*OPEN, DeliveryState.FAILED)


@dataclass(frozen=True, slots=True)
class DeliveryKey:
    """What names a delivery."""

    from_ward: str
    to_ward: str
    sop_instance_uid: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class Delivery:
    """One instance for another ward. `issuer` was in force where it was acquired and `calling_ae` sent it
    there; `size` is in bytes. It is not tried before `due_us`; `reason` is of the last refusal."""

    key: DeliveryKey
    issuer: str
    calling_ae: str
    size: int
    ordered_us: int
    state: DeliveryState = DeliveryState.AWAITED
    due_us: int = 0
    tries: int = 0
    done_us: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class DeliveryStanding:
    """The deliveries of one ward to another, counted. `oldest_us` is when the oldest open one was ordered, 0
    when none is open; `delivered` are those of the last day; `reason` the last that one failed or was put off
    for; `at_us` when this was so."""

    from_ward: str
    to_ward: str
    awaited: int = 0
    ready: int = 0
    oldest_us: int = 0
    delivered: int = 0
    failed: int = 0
    reason: str = ""
    at_us: int = 0

    @property
    def waiting(self) -> int:
        return self.awaited + self.ready


class DeliveryBook(Subject):
    """The deliveries of a region."""

    def order_deliveries(self, wanted: Sequence[Delivery], now_us: int) -> list[DeliveryKey]:
        """Keep what one ward orders for another, and note it in the audit log; durable when this returns.
        Those that are new, or were given up before. What the other ward has delivered to this one itself is
        passed over: nothing goes back to where it came from. Raises OutOfResources when too many are open."""
        if len(wanted) > ORDER_MAX:
            raise InvalidInput(f"more than {ORDER_MAX:,} instances in one order")
        if len({(one.key.from_ward, one.key.to_ward) for one in wanted}) > 1:
            raise InvalidInput("an order is of one ward for one other")
        by_key = {one.key: one for one in wanted}

        def work(connection: Connection) -> list[DeliveryKey]:
            known = {_delivery(row).key: row.state for row in _rows(connection, by_key)}
            came = {_turned(_delivery(row).key) for row in _rows(connection, map(_turned, by_key))}
            again = [key for key, state in known.items() if state == DeliveryState.FAILED]
            fresh = [one for key, one in by_key.items() if key not in known and key not in came]
            if not fresh and not again:
                return []
            pair = fresh[0].key if fresh else again[0]
            if _open_count(connection, pair) + len(fresh) + len(again) > OPEN_MAX:
                raise OutOfResources(f"{OPEN_MAX:,} deliveries to {pair.to_ward} wait already")
            if fresh:
                connection.execute(insert(delivery), [_row(one) for one in fresh])
            _change(connection, again, {
                "state": DeliveryState.AWAITED.value, "tries": 0, "reason": "", "ordered_us": now_us,
            })  # fmt: skip
            count = len(fresh) + len(again)
            row = AuditRow(at_us=now_us, who=pair.from_ward, ward=pair.to_ward, act="order deliveries",
                           subject=f"{count} instances")  # fmt: skip
            connection.execute(insert(audit).values(as_row(row) | {"id": log_key(now_us)}))
            return [*again, *(one.key for one in fresh)]

        return self._database.write(work)

    def awaited_deliveries(
        self, limit: int = PAGE_MAX, *, uids: Iterable[str] | None = None, after: DeliveryKey | None = None
    ) -> list[Delivery]:
        """What the region did not hold yet when it was looked at last: all, in the order of the key, or of
        some UIDs."""
        query = select(delivery).where(delivery.c.state == DeliveryState.AWAITED.value).order_by(*_KEY)
        if after is not None:
            query = query.where(tuple_(*_KEY) > tuple_(*map(literal, _values(after))))
        if uids is not None:
            query = query.where(delivery.c.sop_instance_uid.in_(sorted(uids)[:PAGE_MAX]))
        return self._deliveries(query.limit(min(limit, PAGE_MAX)))

    def ready_deliveries(self, keys: Sequence[DeliveryKey], now_us: int) -> None:
        """The region holds these now."""
        if keys:
            self._database.write(lambda connection: _change(
                connection, keys, {"state": DeliveryState.READY.value, "due_us": now_us},
                only=(DeliveryState.AWAITED,),
            ))  # fmt: skip

    def next_deliveries(self, to_ward: str, now_us: int, limit: int = PAGE_MAX) -> list[Delivery]:
        """What the ward may fetch now, the longest due first."""
        query = (
            select(delivery)
            .where(
                delivery.c.to_ward == to_ward,
                delivery.c.state == DeliveryState.READY.value,
                _is_due(now_us),
            )
            .order_by(delivery.c.due_us, *_KEY)
        )
        return self._deliveries(query.limit(max(0, min(limit, PAGE_MAX))))

    def deliveries(self, keys: Sequence[DeliveryKey]) -> list[Delivery]:
        """Those of these that there are, as they stand, in their order."""
        found = {one.key: one for one in self._database.read(lambda c: list(map(_delivery, _rows(c, keys))))}
        return [found[key] for key in keys if key in found]

    def ready_of(self, keys: Sequence[DeliveryKey]) -> list[Delivery]:
        """Those of these that the ward may fetch, in their order."""
        return [one for one in self.deliveries(keys) if one.state is DeliveryState.READY]

    def wards_with_deliveries(self, now_us: int) -> list[str]:
        """The wards for which something may be fetched now."""
        query = (
            select(delivery.c.to_ward)
            .where(delivery.c.state == DeliveryState.READY.value, _is_due(now_us))
            .distinct()
        )
        return [row.to_ward for row in self._database.read(lambda c: c.execute(query).fetchall())]

    def finish_deliveries(self, keys: Sequence[DeliveryKey], now_us: int) -> None:
        """These are durable at their ward, which is so whatever was thought before."""
        if keys:
            self._database.write(lambda connection: _change(
                connection, keys,
                {"state": DeliveryState.DELIVERED.value, "done_us": now_us, "reason": ""},
                only=NOT_DELIVERED,
            ))  # fmt: skip

    def refuse_delivery(self, key: DeliveryKey, reason: str, now_us: int, *, permanent: bool) -> None:
        """One was not taken: it is tried again after a pause that doubles, or given up after a number of
        tries, or at once when trying again can't help."""

        def work(connection: Connection) -> None:
            row = next(iter(_rows(connection, [key])), None)
            if row is None or row.state != DeliveryState.READY.value:
                return
            tries = row.tries + 1
            values: dict[str, Any] = {"tries": tries, "reason": storable(reason)[:REASON_CHARS_MAX]}
            if permanent or tries >= TRIES_MAX:
                values |= {"state": DeliveryState.FAILED.value, "done_us": now_us}
            else:
                values["due_us"] = now_us + min(PAUSE_FIRST_US << (tries - 1), PAUSE_MAX_US)
            _change(connection, [key], values)

        self._database.write(work)

    def age_deliveries(self, now_us: int) -> None:
        """What has been open for too long is given up, and what has been over for as long is forgotten."""
        too_old = now_us - KEPT_US
        is_open = delivery.c.state.in_([state.value for state in OPEN])
        given_up = (
            update(delivery)
            .where(is_open, delivery.c.ordered_us < too_old)
            .values(
                state=DeliveryState.FAILED.value, done_us=now_us,
                reason=case(
                    (delivery.c.reason != "", delivery.c.reason),
                    (delivery.c.state == DeliveryState.AWAITED.value, "the region never got it"),
                    else_="the ward never fetched it",
                ),
            )
        )  # fmt: skip
        forgotten = delete(delivery).where(~is_open, delivery.c.done_us < too_old)

        def work(connection: Connection) -> None:
            connection.execute(given_up)
            connection.execute(forgotten)

        self._database.write(work)

    def retry_deliveries(self, *, from_ward: str | None = None, to_ward: str | None = None) -> int:
        """Those that were given up are tried anew; how many there were. What the region held already may be
        fetched at once."""
        statement = update(delivery).where(delivery.c.state == DeliveryState.FAILED.value)
        for column, value in ((delivery.c.from_ward, from_ward), (delivery.c.to_ward, to_ward)):
            if value is not None:
                statement = statement.where(column == value)
        held = case(
            (delivery.c.due_us > 0, DeliveryState.READY.value), else_=DeliveryState.AWAITED.value
        )
        values = {"state": held, "tries": 0, "ordered_us": time.time_ns() // 1000}
        return self._database.write(lambda c: c.execute(statement.values(values)).rowcount)

    def troubled_deliveries(self, limit: int = 100) -> list[Delivery]:
        """What failed, or was put off, the last first."""
        troubled = or_(delivery.c.state == DeliveryState.FAILED.value, and_(
            delivery.c.state == DeliveryState.READY.value, delivery.c.tries > 0))  # fmt: skip
        last = case((delivery.c.done_us > 0, delivery.c.done_us), else_=delivery.c.due_us)
        query = select(delivery).where(troubled).order_by(last.desc(), *_KEY)
        return self._deliveries(query.limit(min(limit, PAGE_MAX)))

    def delivery_standings(self, now_us: int, ward: str | None = None) -> list[DeliveryStanding]:
        """How the deliveries stand, from ward to ward; those from and to one ward alone when it is given."""
        pair = (delivery.c.from_ward, delivery.c.to_ward)
        is_open = delivery.c.state.in_([state.value for state in OPEN])
        counts = [func.coalesce(func.sum(case((delivery.c.state == state.value, 1), else_=0)), 0)
                  for state in DeliveryState]  # fmt: skip
        query = (
            select(*pair, *counts, func.min(case((is_open, delivery.c.ordered_us))))
            .where(or_(
                delivery.c.state.in_([state.value for state in NOT_DELIVERED]),
                and_(delivery.c.state == DeliveryState.DELIVERED.value, delivery.c.done_us > now_us - DAY_US),
            ))  # by the index of states: most rows were delivered in the days before
            .group_by(*pair)
            .order_by(*pair)
        )  # fmt: skip
        concerned = or_(delivery.c.from_ward == ward, delivery.c.to_ward == ward)
        if ward is not None:
            query = query.where(concerned)

        def work(connection: Connection) -> list[DeliveryStanding]:
            found = []
            for from_ward, to_ward, awaited, ready, delivered, failed, oldest_us in connection.execute(query):
                reason = connection.execute(
                    select(delivery.c.reason)
                    .where(delivery.c.to_ward == to_ward, delivery.c.from_ward == from_ward,
                           delivery.c.state.in_([state.value for state in NOT_DELIVERED]),
                           delivery.c.reason != "")
                    .order_by(delivery.c.done_us.desc(), delivery.c.due_us.desc())
                    .limit(1)
                ).scalar()  # fmt: skip
                found.append(DeliveryStanding(
                    from_ward, to_ward, int(awaited), int(ready), int(oldest_us or 0), int(delivered),
                    int(failed), reason or "", now_us,
                ))  # fmt: skip
            return found

        return self._database.read(work)

    # What a node was told.

    def note_standings(self, told: Sequence[DeliveryStanding]) -> None:
        """Keep what the hub said of this node's deliveries in place of what it said before."""

        def work(connection: Connection) -> None:
            connection.execute(delete(delivery_told))
            if told:
                connection.execute(insert(delivery_told), [as_row(one) for one in told])

        self._database.write(work)

    def told_standings(self) -> list[DeliveryStanding]:
        """What the hub said last."""
        query = select(delivery_told).order_by(delivery_told.c.from_ward, delivery_told.c.to_ward)
        rows = self._database.read(lambda c: c.execute(query).fetchall())
        return [DeliveryStanding(**row._mapping) for row in rows]

    def _deliveries(self, query: Any) -> list[Delivery]:
        return [_delivery(row) for row in self._database.read(lambda c: c.execute(query).fetchall())]


_KEY = (delivery.c.to_ward, delivery.c.from_ward, delivery.c.sop_instance_uid, delivery.c.digest)


def _is_due(now_us: int) -> ColumnElement[bool]:
    """What was never tried is due, also when the clock was set back since it was ready."""
    return or_(delivery.c.due_us <= now_us, delivery.c.tries == 0)


def _values(key: DeliveryKey) -> tuple[str, str, str, bytes]:
    return key.to_ward, key.from_ward, key.sop_instance_uid, key.digest


def _turned(key: DeliveryKey) -> DeliveryKey:
    return DeliveryKey(key.to_ward, key.from_ward, key.sop_instance_uid, key.digest)


def _row(one: Delivery) -> dict[str, Any]:
    key = one.key
    return {
        "to_ward": key.to_ward, "from_ward": key.from_ward, "sop_instance_uid": key.sop_instance_uid,
        "digest": key.digest, "issuer": storable(one.issuer), "calling_ae": storable(one.calling_ae),
        "size": one.size, "ordered_us": one.ordered_us, "state": one.state.value, "due_us": one.due_us,
        "tries": one.tries, "done_us": one.done_us, "reason": one.reason,
    }  # fmt: skip


def _delivery(row: Any) -> Delivery:
    key = DeliveryKey(row.from_ward, row.to_ward, row.sop_instance_uid, bytes(row.digest))
    return Delivery(
        key, row.issuer, row.calling_ae, row.size, row.ordered_us, DeliveryState(row.state), row.due_us,
        row.tries, row.done_us, row.reason,
    )  # fmt: skip


def _rows(connection: Connection, keys: Iterable[DeliveryKey]) -> list[Any]:
    """The rows of these keys, in questions of a bounded length."""
    ordered = [_values(key) for key in keys]
    rows: list[Any] = []
    for start in range(0, len(ordered), _IN_LIST_MAX):
        asked = tuple_(*_KEY).in_(ordered[start : start + _IN_LIST_MAX])
        rows += connection.execute(select(delivery).where(asked)).fetchall()
    return rows


def _change(
    connection: Connection, keys: Sequence[DeliveryKey], values: dict[str, Any], *,
    only: Sequence[DeliveryState] = tuple(DeliveryState),
) -> None:
    states = [state.value for state in only]
    for start in range(0, len(keys), _IN_LIST_MAX):
        asked = tuple_(*_KEY).in_([_values(key) for key in keys[start : start + _IN_LIST_MAX]])
        connection.execute(update(delivery).where(asked, delivery.c.state.in_(states)).values(values))


def _open_count(connection: Connection, pair: DeliveryKey) -> int:
    query = select(func.count()).select_from(delivery).where(
        delivery.c.to_ward == pair.to_ward, delivery.c.from_ward == pair.from_ward,
        delivery.c.state.in_([state.value for state in OPEN]),
    )  # fmt: skip
    return int(connection.execute(query).scalar_one())
