"""The index: what is in the packs, findable. Derived from packs and facts, disposable, never the only copy.

One class over the database; what it does lies in the modules it calls: `apply.py` and `effects.py` write,
`queries.py` searches, `outbox.py` says what is pending. On SQLite it commits with synchronous=NORMAL: a power
cut may take back its last commits, but the position of the logs stands in the same transaction, so what is
missing is read from the packs again. Several processes may have it open; readers see whole batches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import func, select, text

from archive.database import Database
from archive.index import arrivals, contents, queries, removed, space
from archive.index import described as descriptions
from archive.index import outbox as backlog
from archive.index.apply import apply_entries
from archive.index.cached import Cached
from archive.index.corrected import Corrections, Overlays, apply_corrections
from archive.index.described import Described
from archive.index.effects import apply_facts
from archive.index.inventory import Inventories
from archive.index.remaking import AttributeReader
from archive.index.removed import KnownRemoved, RemovedContent, Tombstone
from archive.index.schema import DERIVED, STEPS, UNDERIVED_COLUMNS, conflict, patient, study
from archive.index.space import Place, Reclaim
from archive.index.statements import move_position, read_positions
from archive.index.stubs import apply_stubs
from archive.index.travel import Travel, note_known
from archive.model import (
    EVERYTHING,
    START,
    UNDECIDED,
    Attributes,
    ConflictRow,
    ConflictState,
    Copies,
    Fact,
    FactKind,
    IndexEntry,
    Known,
    Location,
    Match,
    PendingInstance,
    PendingStudy,
    PendingSummary,
    Position,
    Query,
    Record,
    Refusal,
    Scope,
    Standing,
    StoredInstance,
    Totals,
)
from archive.packs.dropping import ABSENCE_KINDS
from archive.removals import REMOVAL_KINDS, Removal

_LOOKUP = (
    "SELECT digest, study_instance_uid, series_instance_uid, evicted, damaged FROM instance"
    " WHERE sop_instance_uid = ?"
)
_IS_WHOLE = "sop_instance_uid = ? AND digest = ? AND NOT evicted AND NOT damaged"
_HAS_CONFLICT = f"SELECT 1 FROM conflict WHERE {_IS_WHOLE}"
_STATE = "SELECT state FROM conflict WHERE sop_instance_uid = ? AND digest = ? AND NOT evicted"
_LOOKUP_REMOVED = (
    "SELECT digest, purged OR NOT (evicted OR damaged) FROM removed WHERE sop_instance_uid = ?"
)
_HAS_REMOVED = (
    "SELECT 1 FROM removed WHERE sop_instance_uid = ? AND digest = ?"
    " AND (purged OR NOT (evicted OR damaged))"
)
_UNCOMPARED = "SELECT 1 FROM conflict WHERE state IN ('open', 'proposed') AND compared = FALSE LIMIT 1"
_REFUSED = "SELECT 1 FROM refusal WHERE sop_instance_uid = ? AND digest = ?"
_HAS_LIVE = f"SELECT 1 FROM instance WHERE {_IS_WHOLE}"

_APART = ABSENCE_KINDS | {FactKind.CORRECTED}


class Index:
    """An open index. Safe to use from any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._read: AttributeReader = lambda record: None
        self._forget: Callable[[], None] = lambda: None
        self.cached = Cached(database)
        self._removals: bool | None = None
        self.inventories = Inventories(database)
        self.corrections = Corrections(database)
        self.travel = Travel(database)

    @classmethod
    def open(cls, url: str, *, read_only: bool = False) -> Index:
        """Open the index at `url`; a writer makes its tables or brings them forward. SchemaTooNew when a
        newer release made them."""
        return cls(Database(url, name="index", steps=STEPS, read_only=read_only, durable=False))

    @property
    def is_near(self) -> bool:
        """Whether it is a file of this machine: one behind a server may not answer for a while."""
        return self._database.is_sqlite

    def close(self) -> None:
        self._database.close()

    def read_attributes_with(
        self, read: AttributeReader, forget: Callable[[], None] = lambda: None
    ) -> None:
        """How the attributes of what is here are read where it lies; its one writer says so, as some facts
        need them. `forget` is called when a batch of facts has read all that it needs."""
        self._read, self._forget = read, forget

    def read_attributes(self, record: Record) -> Attributes | None:
        """What a record says of itself, from where it lies, or as facts tell it."""
        return self._read(record)

    def positions(self) -> tuple[Position, Position]:
        """How far the packs and the fact log have been applied."""
        packs, facts = self._database.read(read_positions)
        return packs or START, facts or START

    def apply(self, entries: Sequence[IndexEntry], position: Position, *, outbox: bool) -> None:
        """Apply records up to `position` in one transaction; applying them again changes nothing."""

        def work(connection: Any) -> None:
            self._bring_in(connection, entries, outbox)
            move_position(connection, "packs", position)

        self._database.write(work)

    def try_out(self, entries: Sequence[IndexEntry], *, outbox: bool) -> None:
        """Apply records and take them back: raises what `apply` would."""

        def work(connection: Any) -> None:
            with connection.begin_nested() as tried:
                self._bring_in(connection, entries, outbox)
                tried.rollback()

        self._database.write(work)

    def _bring_in(self, connection: Any, entries: Sequence[IndexEntry], outbox: bool) -> None:
        removals = self.has_removals()
        apply_entries(connection, entries, into_outbox=outbox, read=self._read, removals=removals)

    def has_removals(self) -> bool:
        """Whether anything was ever removed here, as far as the one writer knows: asked once, then kept."""
        if self._removals is None:
            self._removals = self._database.quick("SELECT 1 FROM tombstone LIMIT 1") is not None
        return self._removals

    def apply_facts(self, facts: Sequence[Fact], position: Position, *, outbox: bool = False) -> None:
        """Apply facts up to `position` in one transaction."""

        def work(connection: Any) -> None:
            apply_corrections(connection, facts, read=self._read)
            read = Overlays(connection).reader(self._read)
            others = [fact for fact in facts if fact.kind not in _APART]
            apply_facts(connection, others, into_outbox=outbox, read=read)
            space.apply_space_facts(connection, facts)
            apply_stubs(connection, facts, into_outbox=outbox, read=read)
            note_known(connection, facts)
            move_position(connection, "facts", position)

        if any(fact.kind in REMOVAL_KINDS for fact in facts):
            self._removals = True  # before they count: intake asks from then on
        try:
            self._database.write(work)
        finally:
            self._forget()

    def lookup(self, sop_instance_uid: str) -> Known | None:
        """The live content with this UID; microseconds on SQLite, as intake asks it of every instance."""
        row = self._database.quick(_LOOKUP, (sop_instance_uid,))
        return None if row is None else Known(bytes(row[0]), row[1], row[2], bool(row[3]), bool(row[4]))

    def lookup_removed(self, sop_instance_uid: str) -> KnownRemoved | None:
        """What was removed under this UID; to be asked only where `has_removals`."""
        row = self._database.quick(_LOOKUP_REMOVED, (sop_instance_uid,))
        return None if row is None else KnownRemoved(bytes(row[0]), bool(row[1]))

    def removals(
        self, limit: int = 100, *, prefix: str = "", uid: str = "", in_force: bool = False
    ) -> list[Tombstone]:
        """The removals, newest first, and what became of each; those alone whose id begins so, that name this
        UID, or that count."""
        return self._database.read(
            lambda connection: removed.tombstones(connection, limit, prefix, uid=uid, in_force=in_force)
        )

    def holders(self, uids: Iterable[str]) -> dict[str, set[str]]:
        """The wards that hold these instances, shown or removed; those not here are left out."""
        return self._database.read(lambda connection: removed.holders(connection, uids))

    def removals_due(self, before_us: int, limit: int) -> list[Tombstone]:
        """Those that cover what still has its bytes here, and are purged or older than `before_us`."""
        return self._database.read(lambda connection: removed.due(connection, before_us, limit))

    def removed_under(self, removal: Removal, limit: int, *, kept: bool = False) -> list[RemovedContent]:
        """What this removal covers here; with `kept` only what still has its bytes, conflicts too."""
        return self._database.read(lambda connection: removed.contents(connection, removal, limit, kept=kept))

    def has_content(self, sop_instance_uid: str, digest: bytes) -> bool:
        """Whether this very content is here and whole, live or as a conflict, or was removed: what is purged
        is not taken again."""
        content = (sop_instance_uid, digest)
        questions = (_HAS_LIVE, _HAS_CONFLICT, *((_HAS_REMOVED,) if self.has_removals() else ()))
        return any(self._database.quick(question, content) is not None for question in questions)

    def search(self, query: Query) -> list[Match]:
        """The rows that match (PS3.4 C.2.2.2), as far as the query's scope allows. InvalidQuery when it is
        not a question that can be asked here."""
        return self._database.read(lambda connection: queries.search(connection, query))

    def listed(self, query: Query) -> list[tuple[str | int, ...]]:
        """What orders each row that matches: see `queries.listed`."""
        return self._database.read(lambda connection: queries.listed(connection, query))

    def count(self, query: Query) -> int:
        """How many rows match, whatever the limit and the offset."""
        return self._database.read(lambda connection: queries.count(connection, query))

    def instances(
        self,
        study_uid: str,
        series_uid: str | None = None,
        sop_instance_uid: str | None = None,
        *,
        scope: Scope = EVERYTHING,
    ) -> list[StoredInstance]:
        """The instances of a study, a series or one instance, by series, number and UID, each with what is
        corrected of it; none looks like none that the scope allows."""
        found = self._database.read(
            lambda connection: queries.instances(connection, study_uid, series_uid, sop_instance_uid, scope)
        )
        return self.corrections.over(found)

    def pending(
        self, limit: int, known: Mapping[tuple[str, bytes], bool] = backlog.NOTHING
    ) -> list[PendingInstance]:
        """What to offer to the region next: urgent first, then the newest; not what was set aside, nor what
        is `known` by UID and digest, unless it became urgent and is not known as that."""
        return self._database.read(lambda connection: backlog.pending(connection, limit, known))

    def pending_of(
        self, study_uid: str, sop_instance_uid: str | None, limit: int
    ) -> tuple[list[StoredInstance], int]:
        """What is served of a study (or one instance of it) and has no receipt yet, and how many more of it
        are set aside."""
        return self._database.read(lambda c: backlog.of_study(c, study_uid, sop_instance_uid, limit))

    def mark_urgent(self, study_uid: str, sop_instance_uid: str | None = None) -> int:
        """A reader waits for this; how many pending instances it concerns."""
        return self._database.write(lambda c: backlog.mark_urgent(c, study_uid, sop_instance_uid))

    def mark_urgent_all(self, uids: Collection[str]) -> int:
        """Put single instances before the others; how many of them wait."""
        return self._database.write(lambda connection: backlog.mark_urgent_all(connection, uids))

    def note_try(self, sop_instance_uid: str, digest: bytes) -> int:
        """Count one more try of a pending instance, and say how many there were."""
        return self._database.write(lambda c: backlog.note_try(c, sop_instance_uid, digest))

    def pending_summary(self) -> PendingSummary:
        return self._database.read(backlog.summary)

    def pending_studies(self, limit: int = 100) -> list[PendingStudy]:
        """The backlog by study, the oldest first."""
        return self._database.read(lambda connection: backlog.studies(connection, limit))

    def set_aside(self, limit: int = 100) -> list[tuple[str, bytes, str]]:
        """What replication gave up on: UID, digest, reason."""
        return self._database.read(lambda connection: backlog.set_aside(connection, limit))

    def conflicts(
        self, limit: int = 100, *, states: Collection[ConflictState] = UNDECIDED, uid: str | None = None
    ) -> list[ConflictRow]:
        """Contents that are kept beside the live one of their UID, newest first: those that wait for a
        decision, or those in other `states`; of one UID alone when it is given."""
        return self._database.read(lambda c: contents.conflicts(c, limit, states, uid, uncompared=False))

    def has_uncompared(self) -> bool:
        """Whether any undecided content may be compared; cheap, as it is asked every second."""
        return self._database.quick(_UNCOMPARED) is not None

    def uncompared(self, limit: int) -> list[ConflictRow]:
        """Undecided contents that were not compared yet with the live one of their UID."""
        return self._database.read(lambda c: contents.conflicts(c, limit, UNDECIDED, None, uncompared=True))

    def note_compared(self, pairs: Sequence[tuple[str, bytes, bytes]]) -> None:
        """These contents (UID, live digest, other digest) were compared."""
        self._database.write(lambda connection: contents.note_compared(connection, pairs))

    def kept_state(self, sop_instance_uid: str, digest: bytes) -> ConflictState | None:
        """Where a content stands that is kept and not served; None when it is no such."""
        row = self._database.quick(_STATE, (sop_instance_uid, digest))
        return None if row is None else ConflictState(row[0])

    def was_refused(self, sop_instance_uid: str, digest: bytes) -> bool:
        """Whether it is on record that this content was not taken."""
        return self._database.quick(_REFUSED, (sop_instance_uid, digest)) is not None

    def refusals(self, limit: int = 100) -> list[Refusal]:
        """Contents that were not taken, newest first."""
        return self._database.read(lambda connection: contents.refusals(connection, limit))

    def live(self, sop_instance_uid: str) -> StoredInstance | None:
        """The live content of a UID."""
        found = self._database.read(lambda connection: contents.live(connection, sop_instance_uid))
        return None if found is None else self.corrections.over([found])[0]

    def described(self, uids: Iterable[str]) -> list[Described]:
        """The live contents of these UIDs with all that is known of them; those not here are left out."""
        return self._database.read(lambda connection: descriptions.described(connection, uids))

    def described_study(self, study_uid: str) -> list[Described]:
        """The same of a whole study, by UID."""
        return self._database.read(lambda connection: descriptions.of_study(connection, study_uid))

    def described_since(self, since_us: int, after_uid: str, limit: int) -> list[Described]:
        """The same of what was received at `since_us` or later, by UID, beginning after `after_uid`; reads
        through all that is here."""
        return self._database.read(
            lambda connection: descriptions.received_since(connection, since_us, after_uid, limit)
        )

    def standings(self, uids: Iterable[str]) -> dict[str, Standing]:
        """How safe the live contents of these UIDs are, by UID; those that are not here are left out."""
        return self._database.read(lambda connection: contents.standings(connection, uids))

    def instance_counts(self, study_uids: Iterable[str]) -> dict[str, int]:
        """How many instances each of these studies has; those not here are left out."""
        return self._database.read(lambda connection: arrivals.instance_counts(connection, study_uids))

    def studies_received_since(self, since_us: int) -> list[str]:
        """The studies of which something was received at `since_us` or later; reads through all that is
        here."""
        return self._database.read(lambda connection: arrivals.studies_received_since(connection, since_us))

    def places(self, uids: Iterable[str]) -> dict[tuple[str, bytes], Place]:
        """Where the contents of these UIDs lie, by UID and digest."""
        return self._database.read(lambda connection: space.places(connection, uids))

    def contents_of(self, study_uid: str) -> list[tuple[str, bytes, Location]]:
        """The live instances of a study, pack by pack: UID, digest, and where each lies."""
        return self._database.read(lambda connection: space.contents_of(connection, study_uid))

    def has_due(self, now_us: int) -> bool:
        """Whether any space may be given back; microseconds on SQLite, as it is asked each second."""
        return self._database.quick("SELECT 1 FROM reclaim WHERE due_us <= ? LIMIT 1", (now_us,)) is not None

    def due(self, now_us: int, limit: int) -> list[Reclaim]:
        """Space that may be given back by now, pack by pack."""
        return self._database.read(lambda connection: space.due(connection, now_us, limit))

    def note_given_back(self, done: Sequence[Reclaim]) -> None:
        self._database.write(lambda connection: space.forget(connection, done))

    def totals(self) -> Totals:
        """How much there is; from the studies' own counts."""
        sums = [func.coalesce(func.sum(column), 0) for column in
                (study.c.series_count, study.c.instance_count, study.c.bytes)]  # fmt: skip
        query = select(
            select(func.count()).select_from(patient).scalar_subquery(),
            func.count(),
            *sums,
        ).select_from(study)
        states = select(conflict.c.state, func.count()).group_by(conflict.c.state)
        row, kept = self._database.read(
            lambda connection: (connection.execute(query).one(), dict(map(tuple, connection.execute(states))))
        )
        by_state = (kept.get(s.value, 0) for s in
                    (ConflictState.OPEN, ConflictState.PROPOSED, ConflictState.EQUIVALENT))  # fmt: skip
        return Totals(*(int(value) for value in (*row, *by_state)))

    def copies(self) -> Copies:
        """How many instances are not whole here; from small indices of those alone."""
        isnt = "= 1" if self._database.is_sqlite else ""
        query = text(
            f"SELECT (SELECT count(*) FROM instance WHERE evicted {isnt}),"
            f" (SELECT count(*) FROM instance WHERE damaged {isnt})"
        )
        evicted, damaged = self._database.read(lambda connection: connection.execute(query).one())
        return Copies(int(evicted), int(damaged))

    def dump(self) -> dict[str, list[tuple[Any, ...]]]:
        """Everything that derives from packs and facts, in an order of its own: equal for equal logs."""

        def work(connection: Any) -> dict[str, list[tuple[Any, ...]]]:
            content: dict[str, list[tuple[Any, ...]]] = {}
            for table in DERIVED:
                columns = [column for column in table.c if column.name not in UNDERIVED_COLUMNS]
                rows = connection.execute(select(*columns))
                content[table.name] = sorted(
                    tuple(bytes(value) if isinstance(value, memoryview) else value for value in row)
                    for row in rows
                )
            return content

        return self._database.read(work)
