"""What a node keeps on its own disk and why, and, in the region, up to when a backup has everything: studies
that are pinned, when each was last wanted, how its cache stands, and the backups that were declared. It
decides nothing: `node/cache/` and `federation/protection.py` do."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, delete, func, insert, select, update

from archive.database import storable
from archive.errors import OutOfResources
from archive.ledger.tables import Subject, as_row, cache_note, declared_backup, pinned_study, study_use

PERSON, PRIOR = "person", "prior"  # why a study is pinned: somebody said so, or an appointment needs it
PINS_MAX = 100_000
BACKUPS_KEPT = 1_000
_UIDS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Pin:
    """A study whose bytes stay here, until `until_us` (0: until somebody takes the pin away)."""

    study_uid: str
    kind: str
    until_us: int
    by: str
    at_us: int

    def holds(self, now_us: int) -> bool:
        return not self.until_us or self.until_us > now_us


@dataclass(frozen=True, slots=True)
class DeclaredBackup:
    """Somebody said that a backup has everything that the region confirmed up to `as_of_us`."""

    as_of_us: int
    by: str
    at_us: int


class Keeping(Subject):
    """What is kept on a node's disk; the backups of the region."""

    # Pins

    def pin_study(self, pin: Pin) -> None:
        """It takes the place of the pin of the same kind. Raises OutOfResources past PINS_MAX."""
        row = as_row(pin)
        same = (pinned_study.c.study_uid == row["study_uid"]) & (pinned_study.c.kind == row["kind"])

        def work(connection: Connection) -> None:
            if connection.execute(update(pinned_study).where(same).values(row)).rowcount:
                return
            if connection.execute(select(func.count()).select_from(pinned_study)).scalar_one() >= PINS_MAX:
                raise OutOfResources(f"{PINS_MAX:,} studies are pinned already")
            connection.execute(insert(pinned_study).values(row))

        self._database.write(work)

    def unpin_study(self, study_uid: str, kind: str = PERSON) -> bool:
        """Whether there was such a pin."""
        same = (pinned_study.c.study_uid == storable(study_uid)) & (pinned_study.c.kind == kind)
        return bool(self._database.write(lambda c: c.execute(delete(pinned_study).where(same)).rowcount))

    def pins(self) -> list[Pin]:
        """All, those that ended and were not forgotten yet among them."""
        query = select(pinned_study).order_by(pinned_study.c.study_uid, pinned_study.c.kind)
        return [Pin(*row) for row in self._database.read(lambda c: c.execute(query).fetchall())]

    def forget_pins(self, before_us: int) -> None:
        """Those that ended before then."""
        ended = (pinned_study.c.until_us > 0) & (pinned_study.c.until_us < before_us)
        self._database.write(lambda c: c.execute(delete(pinned_study).where(ended)))

    # When each study was last wanted

    def note_uses(self, uses: Mapping[str, int]) -> None:
        """Studies and when they were last wanted, in one transaction."""
        def work(connection: Connection) -> None:
            for study_uid, at_us in uses.items():
                same = study_use.c.study_uid == storable(study_uid)
                if not connection.execute(update(study_use).where(same).values(at_us=at_us)).rowcount:
                    connection.execute(insert(study_use).values(study_uid=storable(study_uid), at_us=at_us))

        if uses:
            self._database.write(work)

    def uses_of(self, study_uids: Collection[str]) -> dict[str, int]:
        """When these were last wanted, of those that ever were."""
        uids, found = sorted(set(study_uids)), dict[str, int]()

        def work(connection: Connection) -> None:
            for at in range(0, len(uids), _UIDS_AT_ONCE):
                some = study_use.c.study_uid.in_(uids[at : at + _UIDS_AT_ONCE])
                found.update((row.study_uid, row.at_us) for row in
                             connection.execute(select(study_use).where(some)))  # fmt: skip

        self._database.read(work)
        return found

    def forget_uses(self, before_us: int) -> None:
        """What was last wanted before then is as good as never wanted."""
        self._database.write(lambda c: c.execute(delete(study_use).where(study_use.c.at_us < before_us)))

    # How the cache stands

    def note_cache(self, name: str, value: str, at_us: int) -> None:
        """A note of the node's cache, for people; it takes the place of the one of the same name."""
        row = {"name": name, "value": storable(value), "at_us": at_us}

        def work(connection: Connection) -> None:
            same = cache_note.c.name == name
            if not connection.execute(update(cache_note).where(same).values(row)).rowcount:
                connection.execute(insert(cache_note).values(row))

        self._database.write(work)

    def cache_note(self, name: str) -> tuple[str, int] | None:
        """The note and when it was written."""
        query = select(cache_note.c.value, cache_note.c.at_us).where(cache_note.c.name == name)
        row = self._database.read(lambda c: c.execute(query).fetchone())
        return None if row is None else (row.value, row.at_us)

    # The region's backups

    def declare_backup(self, backup: DeclaredBackup) -> None:
        """Safe to repeat; of the oldest beyond BACKUPS_KEPT nothing is kept."""
        def work(connection: Connection) -> None:
            same = declared_backup.c.as_of_us == backup.as_of_us
            if not connection.execute(update(declared_backup).where(same).values(as_row(backup))).rowcount:
                connection.execute(insert(declared_backup).values(as_row(backup)))
            kept = select(declared_backup.c.as_of_us).order_by(declared_backup.c.as_of_us.desc())
            oldest = connection.execute(kept.offset(BACKUPS_KEPT).limit(1)).scalar_one_or_none()
            if oldest is not None:
                connection.execute(delete(declared_backup).where(declared_backup.c.as_of_us <= oldest))

        self._database.write(work)

    def last_backup(self) -> DeclaredBackup | None:
        """The one that goes furthest."""
        query = select(declared_backup).order_by(declared_backup.c.as_of_us.desc()).limit(1)
        row = self._database.read(lambda c: c.execute(query).fetchone())
        return None if row is None else DeclaredBackup(*row)
