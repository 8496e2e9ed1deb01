"""What the portal asks: anything that can be searched and read is a `Source`, be it the whole region or one
node alone. Every method takes who asks, decides by `federation/policy.py`, and says in its answer what the
answer covers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

from archive.index.removed import Tombstone
from archive.model import ConflictRow, Match, PatientKey, Query, StoredInstance
from federation.coverage import WardCoverage
from federation.fanout import WardMatches
from federation.gathering import Coming, Found
from federation.policy import Principal


@dataclass(frozen=True, slots=True)
class Answer:
    """A page of matches with what it covers, and whether more follow it."""

    matches: list[Match]
    coverage: list[WardCoverage]
    more: bool = False

    @property
    def covered(self) -> bool:
        """Whether nothing is known to be missing from any ward."""
        return all(ward.covered for ward in self.coverage)


@dataclass(frozen=True, slots=True)
class Listing:
    """A page, and the UIDs of all that it is a page of, in order; `whole` unless there are more than that. A
    page that nothing follows stands for itself: it has no such list."""

    answer: Answer
    uids: tuple[str, ...] = ()
    whole: bool = True


@dataclass(frozen=True, slots=True)
class WardsSaid:
    """What single wards hold alone of what was asked, and how each of them answered."""

    matches: list[WardMatches] = field(default_factory=list)
    coverage: list[WardCoverage] = field(default_factory=list)


class WardsPart(Protocol):
    """The wards' part of a regional answer, asked through the hub. Blocking; MissError when the hub does not
    answer."""

    def search(self, principal: Principal, query: Query, deadline_s: float) -> WardsSaid: ...

    def gather(
        self, principal: Principal, study_uid: str, sop_instance_uid: str | None, deadline_s: float
    ) -> Coming:
        """Has wards push what they hold alone of a study, or of one instance, and says what comes."""

    def passing(self, principal: Principal, instance: StoredInstance) -> Iterator[bytes]:
        """The data set of one that comes, while it arrives; the last of it once it is verified."""


class Source(Protocol):
    """Blocking: called in a thread."""

    def search(self, principal: Principal, query: Query) -> Answer:
        """The matches that the principal may see. Raises Forbidden when the role searches nothing at all."""

    def listing(self, principal: Principal, query: Query, most: int) -> Listing:
        """What `search` gives, with the UIDs at the query's level of all that matches, at most so many, when
        that is more than the page."""

    def instances(
        self,
        principal: Principal,
        study_uid: str,
        series_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> Found:
        """The instances to read; what only a ward holds is on its way when this returns (reading promotes),
        and is `Awaited`. Raises NotFound when there are none that the principal may see: what is hidden looks
        like what does not exist. Unavailable when there are none and a ward that may have some is away or did
        not answer.
        """

    def at_hand(
        self,
        principal: Principal,
        study_uid: str,
        series_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> Found | None:
        """`instances` as far as nobody has to be asked for it, so that it never waits; None when a ward may
        hold more of it.
        """

    def arrived(self, instance: StoredInstance) -> StoredInstance:
        """An instance that `instances` gave, as it is here; waits for one that is awaited. Unavailable when
        it does not come."""

    def passing(self, principal: Principal, instance: StoredInstance) -> Iterator[bytes]:
        """The Part 10 stream of an instance that `instances` gave, while it arrives where it is awaited; the
        last of it once it is verified."""

    def open_payload(self, instance: StoredInstance) -> BinaryIO:
        """The Part 10 stream of an instance that `instances` gave; waits for one that is awaited."""

    def coverage(self) -> list[WardCoverage]:
        """What an answer would cover now, ward by ward, without asking anybody."""

    def conflicts(self, principal: Principal, limit: int) -> list[ConflictRow]:
        """What waits for a person to decide, newest first, of the wards that the principal may search or
        keeps running: UIDs and devices, no patient data."""

    def removals(self, principal: Principal, limit: int) -> list[Tombstone]:
        """What was removed or rejected, newest first, for those who keep it running: UIDs and reasons, no
        patient data. Nothing for others."""

    def person_of(self, principal: Principal, study_uid: str) -> PatientKey | None:
        """The patient of a study that the principal may see."""
