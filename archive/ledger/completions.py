"""Which studies were said to be complete, why, and with how many instances then; and up to which moment the
new instances are accounted for. It decides nothing: `node/completion.py` does."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select, update

from archive.ledger.tables import Subject, as_row, counter, study_completion

KEPT_US = 90 * 86_400 * 1_000_000
_FOLLOWED = "completion_followed_us"
_UIDS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class StudyCompletion:
    """A study was complete at `at_us`, with so many instances, by `why`."""

    study_uid: str
    why: str
    instances: int
    at_us: int


class Completions(Subject):
    """The complete studies of a node."""

    def note_completion(self, completion: StudyCompletion) -> None:
        """It takes the place of what was said of the study before; what is older than 90 days goes."""
        row = as_row(completion)
        study = study_completion.c.study_uid == completion.study_uid
        oldest_us = time.time_ns() // 1000 - KEPT_US

        def work(connection: Connection) -> None:
            if not connection.execute(update(study_completion).where(study).values(row)).rowcount:
                connection.execute(insert(study_completion).values(row))
                connection.execute(delete(study_completion).where(study_completion.c.at_us < oldest_us))

        self._database.write(work)

    def completions_of(self, study_uids: Collection[str]) -> dict[str, StudyCompletion]:
        """What was said of these studies, by UID."""
        uids = list(study_uids)
        found: dict[str, StudyCompletion] = {}

        def work(connection: Connection) -> None:
            for at in range(0, len(uids), _UIDS_AT_ONCE):
                some = study_completion.c.study_uid.in_(uids[at : at + _UIDS_AT_ONCE])
                for row in connection.execute(select(study_completion).where(some)):
                    found[row.study_uid] = StudyCompletion(*row)

        self._database.read(work)
        return found

    def completion_followed_us(self) -> int | None:
        """Instances that were indexed before this moment are accounted for; None when nobody looked yet."""
        query = select(counter.c.value).where(counter.c.name == _FOLLOWED)
        value = self._database.read(lambda c: c.execute(query).scalar_one_or_none())
        return None if value is None else int(value)

    def note_completion_followed(self, at_us: int) -> None:
        def work(connection: Connection) -> None:
            changed = update(counter).where(counter.c.name == _FOLLOWED).values(value=at_us)
            if not connection.execute(changed).rowcount:
                connection.execute(insert(counter).values(name=_FOLLOWED, value=at_us))

        self._database.write(work)
