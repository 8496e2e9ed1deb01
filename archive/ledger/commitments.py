"""Storage commitment's transactions (PS3.4 Annex J), on both sides: what devices asked this archive to commit
("scp"), and what this archive asked of others ("scu"). A transaction and its instances are durable before
anybody is told of them. It decides nothing: `node/commitment/` does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Connection, bindparam, case, delete, func, insert, or_, select, update

from archive.database import storable
from archive.errors import OtherContent, OutOfResources
from archive.ledger.tables import Subject, commitment, commitment_item, log_key

SCP, SCU = "scp", "scu"

# As SCP: it is verified, then its report waits to be heard. As SCU: it is to be asked, then the answer is
# awaited. In the end it is done, or nobody tries any more.
OPEN, ANSWERING, DONE, GIVEN_UP = "open", "answering", "done", "given up"
LIVE = (OPEN, ANSWERING)
ENDED = (DONE, GIVEN_UP)

WAITING, COMMITTED = -1, 0  # reasons that are none

ENDED_MAX = 10_000          # transactions that are over and still shown
OPEN_ITEMS_MAX = 1_000_000  # of all devices together
ERROR_CHARS_MAX = 200
_ITEMS_AT_ONCE = 20_000


@dataclass(frozen=True, slots=True)
class Commitment:
    """One transaction. `device` is the AE title of who asked (as SCP) or is asked (as SCU); `instances` were
    named, of which `failed` are not committed, once that is known (`settled_us`). `tries` is how often
    the answer (as SCP) or the question (as SCU) was sent in vain; the next time is `next_try_us`."""

    id: str
    role: str
    device: str
    transaction_uid: str
    state: str
    asked_us: int
    settled_us: int = 0
    ended_us: int = 0
    next_try_us: int = 0
    instances: int = 0
    failed: int = 0
    tries: int = 0
    last_error: str = ""


@dataclass(frozen=True, slots=True)
class CommitmentItem:
    """One instance of a transaction. `reason` is COMMITTED, WAITING, or why it is not committed (0008,1197);
    `digest` is that of the bytes that were verified, b"" before."""

    sop_class_uid: str
    sop_instance_uid: str
    reason: int = WAITING
    digest: bytes = b""


@dataclass(frozen=True, slots=True)
class CommitmentCounts:
    """How many transactions there are of one role: `open` are verified (or to be asked), `answering` wait for
    an answer, of the `failing` of those a try has failed; `given_up` are over without one."""

    open: int = 0
    answering: int = 0
    failing: int = 0
    given_up: int = 0

    @property
    def is_any(self) -> bool:
        """Whether people may want to know."""
        return bool(self.open or self.answering or self.given_up)


class Commitments(Subject):
    """Storage commitment's transactions of one node."""

    def open_commitment(self, role: str, device: str, transaction_uid: str,
                        references: Mapping[str, str], *, open_max: int = 1000) -> tuple[Commitment, bool]:
        """Begin a transaction about `references` (SOP class by SOP instance UID): it is durable when this
        returns. A live one of the same content is given back, with False; one that is over makes way.

        Raises OtherContent when a live one has this UID and another content, OutOfResources when the device
        has `open_max` live ones, or all have too many instances."""
        now_us = time.time_ns() // 1000
        new = Commitment(log_key(now_us), role, device, transaction_uid, OPEN, now_us, next_try_us=now_us,
                         instances=len(references))
        of_device = (commitment.c.role == role, commitment.c.device == device)
        named = select(commitment).where(*of_device, commitment.c.transaction_uid == transaction_uid)
        live = select(func.count()).where(*of_device, commitment.c.state.in_(LIVE))
        waiting = select(func.coalesce(func.sum(commitment.c.instances), 0)).where(
            commitment.c.role == role, commitment.c.state.in_(LIVE))

        def work(connection: Connection) -> tuple[Commitment, bool]:
            row = connection.execute(named).fetchone()
            if row is not None and row.state in LIVE:
                if _references(connection, row.id) != dict(references):
                    raise OtherContent("this Transaction UID is in use for other instances")
                return _commitment(row), False
            if connection.execute(live).scalar_one() >= open_max:
                raise OutOfResources(f"{open_max:,} storage commitment requests of this device are open")
            if int(connection.execute(waiting).scalar_one()) + len(references) > OPEN_ITEMS_MAX:
                raise OutOfResources("too many instances wait for storage commitment")
            if row is not None:
                _forget(connection, [row.id])
            connection.execute(insert(commitment).values(_row(new)))
            connection.execute(insert(commitment_item), [
                {"commitment": new.id, "sop_instance_uid": uid, "sop_class_uid": sop_class,
                 "reason": WAITING, "digest": b""} for uid, sop_class in references.items()])
            return new, True

        return self._database.write(work)

    def commitment(self, role: str, device: str, transaction_uid: str) -> Commitment | None:
        """The transaction of this UID with a device."""
        found = self._commitments(commitment.c.role == role, commitment.c.device == device,
                                  commitment.c.transaction_uid == transaction_uid)
        return found[0] if found else None

    def asked_commitment(self, transaction_uid: str) -> Commitment | None:
        """The transaction of this UID that we began ourselves."""
        found = self._commitments(commitment.c.role == SCU, commitment.c.transaction_uid == transaction_uid)
        return found[0] if found else None

    def commitments(self, limit: int = 100, *, failed_only: bool = False) -> list[Commitment]:
        """Transactions, newest first; `failed_only`: those with an instance that is not committed, with a try
        that failed, or given up."""
        query = select(commitment).order_by(commitment.c.id.desc()).limit(limit)
        if failed_only:
            query = query.where((commitment.c.failed > 0) | (commitment.c.state == GIVEN_UP)
                                | ((commitment.c.tries > 0) & commitment.c.state.in_(LIVE)))
        return [_commitment(row) for row in self._database.read(lambda c: c.execute(query).fetchall())]

    def has_live_commitments(self, role: str, state: str) -> bool:
        """Whether there is any in this state; microseconds on SQLite, as it is asked every second."""
        return self._database.quick(
            "SELECT 1 FROM commitment WHERE role = ? AND state = ? LIMIT 1", (role, state)) is not None

    def live_commitments(self, role: str, state: str, *, due_us: int | None = None,
                         limit: int = 10_000) -> list[Commitment]:
        """Those in this state, the longest due first; with `due_us` only those due by then, or not tried
        since they were asked or settled: these are due also when the clock was set back."""
        where = [commitment.c.role == role, commitment.c.state == state]
        if due_us is not None:
            untried = (commitment.c.asked_us, commitment.c.settled_us)
            where.append(or_(commitment.c.next_try_us <= due_us, commitment.c.next_try_us.in_(untried)))
        return self._commitments(*where, limit=limit)

    def commitments_of(self, role: str, device: str, state: str) -> list[Commitment]:
        """Those of one device that are in this state."""
        return self._commitments(commitment.c.role == role, commitment.c.device == device,
                                 commitment.c.state == state)

    def waiting_items(self, commitment_id: str, after_uid: str, limit: int) -> list[CommitmentItem]:
        """Instances of which nothing is known yet, by UID, those after `after_uid`."""
        query = (select(commitment_item)
                 .where(commitment_item.c.commitment == commitment_id, commitment_item.c.reason == WAITING,
                        commitment_item.c.sop_instance_uid > after_uid)
                 .order_by(commitment_item.c.sop_instance_uid).limit(limit))
        return [_item(row) for row in self._database.read(lambda c: c.execute(query).fetchall())]

    def commitment_items(self, commitment_id: str) -> list[CommitmentItem]:
        """All of them, by UID. Of a transaction that is done, as SCP, only those that failed."""
        query = (select(commitment_item).where(commitment_item.c.commitment == commitment_id)
                 .order_by(commitment_item.c.sop_instance_uid))
        return [_item(row) for row in self._database.read(lambda c: c.execute(query).fetchall())]

    def note_items(self, commitment_id: str, known: Sequence[CommitmentItem]) -> None:
        """Write down what became known of instances."""
        statement = update(commitment_item).where(
            commitment_item.c.commitment == commitment_id,
            commitment_item.c.sop_instance_uid == bindparam("b_uid"),
        ).values(reason=bindparam("b_reason"), digest=bindparam("b_digest"))
        rows = [{"b_uid": one.sop_instance_uid, "b_reason": one.reason, "b_digest": one.digest}
                for one in known]
        if rows:
            self._database.write(lambda connection: connection.execute(statement, rows))

    def settle_commitment(self, commitment_id: str, remaining: Mapping[bool, int] | None = None) -> bool:
        """The outcome is known when no instance waits any more: then the transaction is to be answered, and
        True is returned. `remaining` gives those that wait a reason, by whether they were verified."""
        now_us = time.time_ns() // 1000
        mine = commitment_item.c.commitment == commitment_id
        failed = select(func.count()).where(mine, commitment_item.c.reason > COMMITTED)

        def work(connection: Connection) -> bool:
            for verified, reason in (remaining or {}).items():
                is_verified = commitment_item.c.digest != b"" if verified else commitment_item.c.digest == b""
                connection.execute(update(commitment_item).where(
                    mine, commitment_item.c.reason == WAITING, is_verified).values(reason=reason))
            waits = select(commitment_item.c.reason).where(mine, commitment_item.c.reason == WAITING).limit(1)
            if connection.execute(waits).fetchone() is not None:
                return False
            changed = update(commitment).where(commitment.c.id == commitment_id, commitment.c.state == OPEN)
            return connection.execute(changed.values(
                state=ANSWERING, failed=connection.execute(failed).scalar_one(), settled_us=now_us,
                next_try_us=now_us)).rowcount > 0

        return self._database.write(work)

    def await_answer(self, commitment_id: str, next_try_us: int) -> None:
        """As SCU: the question was taken; nothing is tried again before `next_try_us`."""
        self._change_commitment(commitment_id, (OPEN,), state=ANSWERING, next_try_us=next_try_us,
                                last_error="")

    def note_failed_try(self, commitment_id: str, error: str, next_try_us: int) -> None:
        """A try failed; the next one is not before `next_try_us`."""
        self._change_commitment(commitment_id, LIVE, tries=commitment.c.tries + 1, next_try_us=next_try_us,
                                last_error=storable(error)[:ERROR_CHARS_MAX])

    def end_commitment(self, commitment_id: str, state: str, error: str | None = None) -> None:
        """It is over: DONE or GIVEN_UP. As SCP, what was committed need not be listed any more."""
        values: dict[str, Any] = {"state": state, "ended_us": time.time_ns() // 1000}
        if error is not None:
            values["last_error"] = storable(error)[:ERROR_CHARS_MAX]
        live = (commitment.c.id == commitment_id, commitment.c.state.in_(LIVE))
        committed = delete(commitment_item).where(
            commitment_item.c.commitment == commitment_id, commitment_item.c.reason == COMMITTED)

        def work(connection: Connection) -> None:
            row = connection.execute(select(commitment.c.role).where(*live)).fetchone()
            if row is None:
                return
            connection.execute(update(commitment).where(*live).values(values))
            if row.role == SCP:
                connection.execute(committed)

        self._database.write(work)

    def answer_commitment(self, commitment_id: str, reasons: Mapping[str, int], unmentioned: int) -> None:
        """As SCU: the answer came, in one transaction with the end; `reasons` by SOP instance UID, those that
        it does not mention get `unmentioned`. One that is DONE keeps its first answer."""
        now_us = time.time_ns() // 1000

        def work(connection: Connection) -> None:
            row = connection.execute(select(commitment).where(
                commitment.c.id == commitment_id, commitment.c.state != DONE)).fetchone()
            if row is None:
                return
            mine = commitment_item.c.commitment == commitment_id
            uids = [one.sop_instance_uid for one in connection.execute(select(commitment_item).where(mine))]
            outcome = {uid: reasons.get(uid, unmentioned) for uid in uids}
            connection.execute(
                update(commitment_item).where(mine, commitment_item.c.sop_instance_uid == bindparam("b_uid"))
                .values(reason=bindparam("b_reason")),
                [{"b_uid": uid, "b_reason": reason} for uid, reason in outcome.items()])
            connection.execute(update(commitment).where(commitment.c.id == commitment_id).values(
                state=DONE, settled_us=now_us, ended_us=now_us, last_error="",
                failed=sum(1 for reason in outcome.values() if reason != COMMITTED)))

        self._database.write(work)

    def forget_commitments(self, before_us: int) -> int:
        """Remove what was over before that, and the oldest past ENDED_MAX; how many that were. A bounded
        piece at a time, so that nobody waits long: 0 says that there is no more."""
        over = select(commitment.c.id, commitment.c.instances).where(commitment.c.state.in_(ENDED))
        old = over.where(commitment.c.ended_us < before_us).limit(1000)
        many = over.order_by(commitment.c.id.desc()).offset(ENDED_MAX).limit(1000)

        def work(connection: Connection) -> int:
            ids, items = [], 0
            for row in (*connection.execute(old), *connection.execute(many)):
                if items and items + row.instances > _ITEMS_AT_ONCE:
                    break
                ids.append(row.id)
                items += row.instances
            _forget(connection, ids)
            return len(ids)

        return self._database.write(work)

    def commitment_counts(self, role: str) -> CommitmentCounts:
        failing = func.sum(case((commitment.c.tries > 0, 1), else_=0))
        query = (select(commitment.c.state, func.count(), failing).where(commitment.c.role == role)
                 .group_by(commitment.c.state))
        rows = self._database.read(lambda c: c.execute(query).fetchall())
        count = {state: int(number) for state, number, _ in rows}
        return CommitmentCounts(count.get(OPEN, 0), count.get(ANSWERING, 0),
                                sum(int(tried or 0) for state, _, tried in rows if state in LIVE),
                                count.get(GIVEN_UP, 0))

    def _change_commitment(self, commitment_id: str, states: Sequence[str], **values: Any) -> None:
        changed = update(commitment).where(commitment.c.id == commitment_id, commitment.c.state.in_(states))
        self._database.write(lambda connection: connection.execute(changed.values(values)))

    def _commitments(self, *where: Any, limit: int = 10_000) -> list[Commitment]:
        query = (select(commitment).where(*where).order_by(commitment.c.next_try_us, commitment.c.id)
                 .limit(limit))
        return [_commitment(row) for row in self._database.read(lambda c: c.execute(query).fetchall())]


def _references(connection: Connection, commitment_id: str) -> dict[str, str]:
    rows = connection.execute(select(commitment_item.c.sop_instance_uid, commitment_item.c.sop_class_uid)
                              .where(commitment_item.c.commitment == commitment_id))
    return {row.sop_instance_uid: row.sop_class_uid for row in rows}


def _forget(connection: Connection, ids: Sequence[str]) -> None:
    for at in range(0, len(ids), 500):
        part = list(ids[at:at + 500])
        connection.execute(delete(commitment_item).where(commitment_item.c.commitment.in_(part)))
        connection.execute(delete(commitment).where(commitment.c.id.in_(part)))


def _row(one: Commitment) -> dict[str, Any]:
    return {field.name: getattr(one, field.name) for field in fields(one)}


def _commitment(row: Any) -> Commitment:
    return Commitment(**row._mapping)


def _item(row: Any) -> CommitmentItem:
    return CommitmentItem(row.sop_class_uid, row.sop_instance_uid, row.reason, bytes(row.digest))
