"""The domain's own objects, frozen, shared by every package; no wire type and no database row among them.

Times are integers of microseconds since 1970 UTC (`*_us`); sizes are bytes. A `Fields` maps DICOM keywords to
values in DICOM's own string form, several values joined by a backslash (PS3.5 6.4), text already decoded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from functools import lru_cache

from archive.errors import InvalidInstance

Fields = Mapping[str, str]

_UID = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))*", re.ASCII)
UID_LENGTH_MAX = 64
DEVICE_SERVICES = ("store", "find", "retrieve", "commit", "worklist", "mpps")  # what a device may be allowed
DEVICE_REACHES = ("ward", "region")       # how far it searches and retrieves
ON_INCOMPLETE = ("succeed", "fail")       # how its search of the region ends when a ward is missing
DEVICE_MAX_AGE_S = 12 * 3600              # how old what is known of a ward may be for that


@lru_cache(maxsize=8192)  # an instance's UID is looked at three times, its study's by every instance
def is_uid(text: str) -> bool:
    """Whether `text` is a UID by PS3.5 9.1: digits and dots, no leading zeros, at most 64 characters."""
    return len(text) <= UID_LENGTH_MAX and _UID.fullmatch(text) is not None


def require_uid(text: str, what: str) -> str:
    """`text` if it is a UID, else InvalidInstance naming `what`, never the value: it came from outside."""
    if not is_uid(text):
        raise InvalidInstance(f"{what} is not a UID (PS3.5 9.1)")
    return text


class Level(Enum):
    """The levels of the information model (PS3.4 C.6), from the widest to the narrowest."""

    PATIENT = "PATIENT"
    STUDY = "STUDY"
    SERIES = "SERIES"
    IMAGE = "IMAGE"


@dataclass(frozen=True, slots=True)
class Ward:
    """An organisational unit of one hospital that runs a node.

    `id` is the certificate's word for it, `hospital/ward` in lower-case slugs: unique in the region.
    `issuer` is the assigning authority of the Patient IDs it sends.
    """

    id: str
    hospital: str
    name: str
    issuer: str


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an instance came from, fixed when its first byte arrived; kept in the record, not in the data
    set."""

    ward: str
    issuer: str
    device: str
    calling_ae: str
    received_at_us: int


@dataclass(frozen=True, slots=True)
class InstanceHead:
    """What is known of an instance before its data set arrives."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    provenance: Provenance


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in a log of files that are numbered from 1: every record below it was appended before it."""

    file: int
    offset: int


START = Position(1, 0)


class RecordKind(IntEnum):
    """What a record of a pack is. The kind is the decision: an instance that lost to an earlier copy with the
    same UID is written as CONFLICT, so that a rebuilt index decides as the first one did."""

    INSTANCE = 1
    CONFLICT = 2
    MARK = 3


@dataclass(frozen=True, slots=True)
class Location:
    """Where a payload (a whole Part 10 stream, PS3.10 7.1) lies. `dataset_offset` counts from its first
    byte."""

    pack: str
    offset: int
    length: int
    dataset_offset: int


@dataclass(frozen=True, slots=True)
class Record:
    """A record as it stands in a pack; `end` is the position just after it in the log."""

    kind: RecordKind
    sequence: int
    head: InstanceHead
    digest: bytes
    location: Location
    end: Position


@dataclass(frozen=True, slots=True)
class Attributes:
    """What the index keeps of one instance, by level; the keywords are those of `archive/catalog.py`."""

    patient: Fields
    study: Fields
    series: Fields
    instance: Fields

    @property
    def study_uid(self) -> str:
        return self.study["StudyInstanceUID"]

    @property
    def series_uid(self) -> str:
        return self.series["SeriesInstanceUID"]


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One record with the attributes read from its data set."""

    record: Record
    attributes: Attributes


class Outcome(Enum):
    """What intake decided about an instance, before it answered."""

    STORED = "stored"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"


class ConflictPolicy(Enum):
    """What becomes of another content under a UID that is here, by the device that sends it. The values are
    the ledger's words."""

    KEEP = "keep"        # the first stays, the second is kept apart and shown
    REFUSE = "refuse"    # not stored
    PROPOSE = "propose"  # kept apart, as a correction that a person may accept


class ConflictState(Enum):
    """Where a content stands that is kept and not served. The values are the index's words."""

    OPEN = "open"              # nobody has decided yet
    PROPOSED = "proposed"      # so, and it was sent as a correction
    EQUIVALENT = "equivalent"  # the live content in another encoding: nothing to decide
    REJECTED = "rejected"      # a person closed it
    REPLACED = "replaced"      # it was live, until a person accepted another


TOLD = "accepted "  # in the detail of a receipt, before the time of the decision that the region was told of

UNDECIDED = (ConflictState.OPEN, ConflictState.PROPOSED)


class FactKind(Enum):
    """What can't be derived from instances (design: the fact log). The values are written to disk."""

    RECEIPT = "receipt"      # the region holds this instance of ours, durably
    COPY = "copy"            # another ward holds the same instance (same UID, same digest)
    SET_ASIDE = "set-aside"  # replication gave up on this instance, with the reason
    RETRY = "retry"          # a person asked to try it again
    DAMAGE = "damage"        # a promised record no longer matches its digest
    EVICTED = "evicted"      # its bytes are given up here, the region has them; `entry` is what stood there
    MOVED = "moved"          # `entry` stood in a pack that goes; what counts of it was written once more
    DROPPED = "dropped"      # a pack is gone on purpose: which, and where it ended, is in `detail`
    ACCEPTED = "accepted"    # a person made this content the live one of its UID
    REJECTED = "rejected"    # a person closed the conflict; the content is kept
    EQUIVALENT = "equivalent"  # the live content in another encoding: no conflict
    REFUSED = "refused"      # another content under a UID that is here, not stored
    PROPOSED = "proposed"    # this content was sent as a correction of the live one
    REMOVED = "removed"      # a study, series or instance is no longer shown (`archive/removals.py`)
    RESTORED = "restored"    # a removal was undone
    PURGED = "purged"        # what was removed gives its bytes back, for good
    CORRECTED = "corrected"  # a person corrected the attributes of a patient or study
    LOST = "lost"            # the region no longer has what it gave a receipt for: it is pushed again


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact. `ward` is whom it is about (a COPY's holder), `detail` a short reason without patient data.
    `entry` is the record that an EVICTED or MOVED is about, as the index needs it to be made anew."""

    kind: FactKind
    sop_instance_uid: str
    digest: bytes
    ward: str
    at_us: int
    detail: str = ""
    entry: IndexEntry | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class Scope:
    """Which wards' instances a question may touch; `wards=None` is every ward. Made by
    `federation/policy.py`."""

    wards: frozenset[str] | None = None

    def allows(self, ward: str) -> bool:
        return self.wards is None or ward in self.wards


EVERYTHING = Scope()
NOTHING = Scope(frozenset())


@dataclass(frozen=True, slots=True)
class PatientKey:
    """A patient is an issuer and an ID, never the ID alone: two hospitals both use 123."""

    issuer: str
    patient_id: str


@dataclass(frozen=True, slots=True)
class Rules:
    """How keys match beyond the baseline, where both sides agreed on it (PS3.4 C.5.1.1, PS3.18 8.3.4).

    `timezone` is the offset from UTC (`+0100`) that dates and times of keys are in: they are compared as
    moments with stored ones whose own offset is known, and as they stand with the others.
    """

    fuzzy_names: bool = False
    empty_values: bool = False     # a key of two quotation marks matches what has no value (C.2.2.2.7)
    multiple_values: bool = False  # each of a key's values is to be there (C.2.2.2.8)
    timezone: str = ""


LITERAL = Rules()


@dataclass(frozen=True, slots=True, order=True)
class StudyPlace:
    """Where a study stands among others: they are listed from the last place to the first."""

    date: str
    time: str
    uid: str


@dataclass(frozen=True, slots=True)
class Query:
    """A question to a source. `keys` are (keyword or dotted path, value in DICOM's matching form, PS3.4
    C.2.2.2); an empty value is universal matching. Order is StudyDate, StudyTime, StudyInstanceUID descending
    at study level, and by number and UID ascending below it. `after` asks for the studies behind that place
    alone: a list that is read on from the last row it showed shows none twice and misses none, whatever
    arrives meanwhile."""

    level: Level
    keys: tuple[tuple[str, str], ...] = ()
    scope: Scope = EVERYTHING
    person: frozenset[PatientKey] | None = None  # bind to these patients (the viewer's priors)
    combine_datetime: bool = False               # QIDO (PS3.18 8.3.4.1.1), not C-FIND without negotiation
    rules: Rules = LITERAL
    pending_only: bool = False                   # only instances that have no receipt yet
    limit: int | None = None
    offset: int = 0
    after: StudyPlace | None = None


@dataclass(frozen=True, slots=True)
class SeriesHolding:
    """The instances of one series behind a match, so that a union counts each once."""

    series_uid: str
    modality: str
    sop_instance_uids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """One answer, at `level`; the parts below the level are empty. Counts and lists regard what the scope
    allows.

    `holdings` is filled for `pending_only` questions alone (at most 1,000 UIDs; `truncated` says so).
    `pending_at` names the wards that hold a part of it alone, without a receipt from the region yet.
    `nearline` says that the bytes of a part of it are not here, but have to be fetched from the region.
    """

    level: Level
    issuer: str
    patient: Fields
    study: Fields = field(default_factory=dict)
    series: Fields = field(default_factory=dict)
    instance: Fields = field(default_factory=dict)
    modalities: tuple[str, ...] = ()
    sop_classes: tuple[str, ...] = ()
    series_count: int = 0
    instance_count: int = 0
    study_count: int = 0
    wards: tuple[str, ...] = ()
    holdings: tuple[SeriesHolding, ...] = ()
    truncated: bool = False
    pending_at: tuple[str, ...] = ()
    nearline: bool = False

    @property
    def place(self) -> StudyPlace:
        """Where its study stands among others."""
        study = self.study
        return StudyPlace(study.get("StudyDate", ""), study.get("StudyTime", ""), study["StudyInstanceUID"])


@dataclass(frozen=True, slots=True)
class Overlay:
    """What people corrected of a study, as it counts now: values by keyword, an empty one for none. `at_us`
    is when the last of it was decided, `ward` where, "" for the region."""

    values: tuple[tuple[str, str], ...]
    at_us: int
    ward: str


@dataclass(frozen=True, slots=True)
class StoredInstance:
    """An instance that is listed here, and can be read here unless it was evicted: then the region has it.
    `digest` is SHA-256 of the data set without group 2; `damaged` bytes are known not to match it. Its
    location and its digest are of the bytes as they came; readers get them with `corrections` applied."""

    study_uid: str
    series_uid: str
    head: InstanceHead
    digest: bytes
    location: Location
    instance: Fields
    evicted: bool = False
    damaged: bool = False
    corrections: Overlay | None = None


@dataclass(frozen=True, slots=True)
class PendingInstance:
    """An instance of a node's outbox: acknowledged here, without a receipt from the region. `conflict` ones
    travel too; `accepted_us` is when a person made it the live one, 0 when none did: the region is told."""

    study_uid: str
    head: InstanceHead
    digest: bytes
    location: Location
    conflict: bool
    urgent: bool
    tries: int
    accepted_us: int = 0

    @property
    def dataset_bytes(self) -> int:
        return self.location.length - self.location.dataset_offset


@dataclass(frozen=True, slots=True)
class PendingSummary:
    """A node's backlog. `oldest_us` is when the oldest of it was received, None when there is none."""

    count: int
    bytes: int
    oldest_us: int | None
    set_aside: int


@dataclass(frozen=True, slots=True)
class ConflictRow:
    """Two contents under one SOP Instance UID: the one (`kept_...`) is served, the other is kept and shown to
    people only. `kept_digest` is empty where nothing is served."""

    sop_instance_uid: str
    study_uid: str
    series_uid: str
    kept_digest: bytes
    kept_study_uid: str
    kept_series_uid: str
    other_digest: bytes
    head: InstanceHead
    location: Location
    state: ConflictState
    decided_by: str
    decided_us: int
    receipt_us: int

    @property
    def ward(self) -> str:
        return self.head.provenance.ward

    @property
    def device(self) -> str:
        return self.head.provenance.device

    @property
    def received_at_us(self) -> int:
        return self.head.provenance.received_at_us


@dataclass(frozen=True, slots=True)
class Refusal:
    """A content that was not taken, since its device's are refused where another is here under their UID."""

    sop_instance_uid: str
    digest: bytes
    ward: str
    device: str
    at_us: int


@dataclass(frozen=True, slots=True)
class Totals:
    """How much an archive holds. `conflicts` wait for a decision, `proposed` too and are corrections;
    `equivalents` are no conflicts."""

    patients: int
    studies: int
    series: int
    instances: int
    bytes: int
    conflicts: int
    proposed: int = 0
    equivalents: int = 0


@dataclass(frozen=True, slots=True)
class Copies:
    """How many instances are listed whose bytes are not here: given back, or no longer those of their
    digest."""

    evicted: int = 0
    damaged: int = 0


@dataclass(frozen=True, slots=True)
class Known:
    """What the index says of a SOP Instance UID that it holds, for intake's decision."""

    digest: bytes
    study_uid: str
    series_uid: str
    evicted: bool = False  # its bytes were given up here: the region has them
    damaged: bool = False  # its bytes here are no longer those that came


@dataclass(frozen=True, slots=True)
class Standing:
    """How safe a live instance is: `receipt_us` is when the region confirmed exactly this content (0: not
    yet), `contested_by` are the AE titles that sent another content under its UID, of which nobody has
    decided yet; `uncompared_by` those of them whose content was not even compared with it yet."""

    instance: StoredInstance
    receipt_us: int
    damaged: bool
    contested_by: frozenset[str] = frozenset()
    uncompared_by: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class PendingStudy:
    """The part of a node's backlog that belongs to one study."""

    study_uid: str
    count: int
    bytes: int
    oldest_us: int
    set_aside: int
