"""Owns what a C-MOVE or C-GET asks for (PS3.4 C.4.2.1.4, C.4.3.1.3): the identifier, held to its model's
hierarchy, and the instances that it names. It never sends any."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, BinaryIO, Protocol

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from archive.errors import InvalidQuery, MissError, NotFound, OutOfResources, Unavailable
from archive.model import Level, Match, PatientKey, Query, Scope, StoredInstance, is_uid
from federation.policy import Act, Principal, Reach, require
from node.dimse.contexts import (
    PATIENT_ROOT_GET,
    PATIENT_ROOT_MOVE,
    PATIENT_STUDY_ONLY_GET,
    PATIENT_STUDY_ONLY_MOVE,
    STUDY_ROOT_GET,
    STUDY_ROOT_MOVE,
)
from node.dimse.errors import AssociationEnded
from node.dimse.exchange import Caller
from node.dimse.identifiers import careful, read_identifier
from node.dimse.payloads import Fetcher

if TYPE_CHECKING:
    from archive.archive import Archive
    from federation.source import Answer

log = logging.getLogger(__name__)

INSTANCES_MAX = 100_000   # of one retrieve: each is a kilobyte of memory until it is done
STUDIES_MAX = 10_000      # of one patient
UIDS_MAX = 10_000         # of studies or series in one identifier: each is looked up by itself

_ALL = (Level.PATIENT, Level.STUDY, Level.SERIES, Level.IMAGE)
LEVELS: Mapping[str, Sequence[Level]] = {
    **dict.fromkeys((PATIENT_ROOT_MOVE, PATIENT_ROOT_GET), _ALL),
    **dict.fromkeys((STUDY_ROOT_MOVE, STUDY_ROOT_GET), _ALL[1:]),
    **dict.fromkeys((PATIENT_STUDY_ONLY_MOVE, PATIENT_STUDY_ONLY_GET), _ALL[:2]),
}
UNIQUE_KEY: Mapping[Level, str] = {
    Level.PATIENT: "PatientID", Level.STUDY: "StudyInstanceUID", Level.SERIES: "SeriesInstanceUID",
    Level.IMAGE: "SOPInstanceUID",
}


class CannotCount(MissError):
    """The instances of a retrieve could not be found out (A701)."""


class Window(Fetcher, Protocol):
    """The region, for devices that may look there."""

    def search(self, principal: Principal, query: Query) -> Answer: ...

    def instances(self, principal: Principal, study_uid: str, series_uid: str | None = None,
                  sop_instance_uid: str | None = None) -> Sequence[StoredInstance]: ...

    def fetch(self, principal: Principal, instance: StoredInstance) -> BinaryIO:
        """Its data set, whole and verified, in an open file at its beginning."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an identifier names: one value for each level above the lowest, one or several at that."""

    level: Level
    patient_id: str = ""
    study_uids: tuple[str, ...] = ()
    series_uids: tuple[str, ...] = ()
    sop_instance_uids: tuple[str, ...] = ()


def read_wanted(octets: bytes, transfer_syntax_uid: str, sop_class_uid: str) -> Wanted:
    """Raises InvalidQuery (A900) where the identifier does not fit its SOP class, CannotUnderstand where it
    can't be read. Keys that are no unique ones of its levels are passed over (C.4.2.1.4.1 knows of none)."""
    identifier = read_identifier(octets, transfer_syntax_uid)
    return careful(lambda: _wanted(identifier, LEVELS[sop_class_uid]))


def _wanted(identifier: Dataset, levels: Sequence[Level]) -> Wanted:
    name = str(identifier.get("QueryRetrieveLevel") or "").strip()
    level = next((each for each in levels if each.value == name), None)
    if level is None:
        raise InvalidQuery("the Query/Retrieve Level is missing, or none of this model", "QueryRetrieveLevel")
    values = {each: _values(identifier, each, lowest=each is level)
              for each in levels[:levels.index(level) + 1]}
    patient_id, = values.get(Level.PATIENT, ("",))
    return Wanted(level, patient_id, *(values.get(each, ()) for each in _ALL[1:]))


def _values(identifier: Dataset, level: Level, *, lowest: bool) -> tuple[str, ...]:
    keyword = UNIQUE_KEY[level]
    value = identifier.get(keyword)
    if isinstance(value, bytes):  # a list that is too long for its VR is told as UN (PS3.5 6.2.2)
        value = value.decode("ascii", "replace").rstrip(" \0").split("\\")
    several = list(value) if isinstance(value, MultiValue | list) else [value]
    values = tuple(dict.fromkeys(text for each in several if each and (text := str(each).strip())))
    if not values:
        raise InvalidQuery(f"{keyword} is missing", keyword)
    if len(values) > 1 and (not lowest or level is Level.PATIENT):
        raise InvalidQuery(f"{keyword} has several values", keyword)
    if level is Level.PATIENT:
        if "*" in values[0] or "?" in values[0]:
            raise InvalidQuery(f"{keyword} is not a single value", keyword)
    elif level is not Level.IMAGE and len(values) > UIDS_MAX:
        raise InvalidQuery(f"{keyword} has more than {UIDS_MAX:,} values", keyword)
    elif not all(map(is_uid, values)):
        raise InvalidQuery(f"{keyword} is not a UID", keyword)
    return values


@dataclass(frozen=True, slots=True)
class Selection:
    """Finds the instances that are wanted. `issuer` is of the Patient IDs of devices that have none of their
    own; by a `window` those of the region are found too, for who may look there."""

    archive: Archive
    ward: str
    issuer: str
    window: Window | None = None

    def principal(self, caller: Caller) -> Principal:
        """In whose name a device's retrieve is done."""
        return caller.principal(self.ward)

    def instances(self, wanted: Wanted, caller: Caller,
                  given_up: Callable[[], bool] = lambda: False) -> list[StoredInstance]:
        """By study as named, series, number and UID; what there was so far when `given_up` says so, which is
        asked again and again. Raises Forbidden; InvalidQuery for a Patient ID of several issuers; CannotCount
        when archive or region can't be asked, or name too many."""
        principal = self.principal(caller)
        window = self.window if principal.reach is Reach.REGION else None
        search = _Search(self.archive, window, principal, require(principal, Act.READ),
                         whole=caller.on_incomplete == "fail", given_up=given_up)
        found: dict[str, StoredInstance] = {}
        try:
            for study_uid in search.studies(wanted, caller.issuer or self.issuer):
                for each in search.of_study(wanted, study_uid):
                    found.setdefault(each.head.sop_instance_uid, each)
                if len(found) > INSTANCES_MAX:
                    raise CannotCount(f"more than {INSTANCES_MAX} instances: ask for fewer at once")
        except AssociationEnded:  # what `given_up` found
            raise
        except (OutOfResources, Unavailable) as error:
            raise CannotCount(str(error)) from None
        return list(found.values())


@dataclass(frozen=True, slots=True)
class _Search:
    """One retrieve's questions, to the archive and perhaps the region. `whole` is for who is to hear of a
    region that is away, rather than to get what is here."""

    archive: Archive
    window: Window | None
    principal: Principal
    scope: Scope
    whole: bool
    given_up: Callable[[], bool]

    def studies(self, wanted: Wanted, issuer: str) -> Sequence[str]:
        if not wanted.patient_id:
            return wanted.study_uids
        person = self._person(wanted.patient_id, issuer, any_of=wanted.study_uids)
        query = Query(Level.STUDY, scope=self.scope, person=person, limit=STUDIES_MAX)
        uids = dict.fromkeys(match.study["StudyInstanceUID"] for match in self._matches(query))
        return [uid for uid in uids if not wanted.study_uids or uid in wanted.study_uids]

    def _person(self, patient_id: str, issuer: str, *, any_of: Sequence[str]) -> frozenset[PatientKey]:
        """A request can't say whose Patient ID it means (M7): whose the device's are, else the only one there
        is. With studies named, any: those say who is meant."""
        query = Query(Level.PATIENT, (("PatientID", patient_id),), self.scope)
        issuers = {match.issuer for match in self._matches(query)}
        if not any_of and len(issuers) > 1:
            if issuer not in issuers:
                raise InvalidQuery("this Patient ID is of several issuers: retrieve by study", "PatientID")
            issuers = {issuer}
        return frozenset(PatientKey(each, patient_id) for each in issuers)

    def _matches(self, query: Query) -> Sequence[Match]:
        found = self.archive.search(query)
        return found if self.window is None else [*found, *self.window.search(self.principal, query).matches]

    def of_study(self, wanted: Wanted, study_uid: str) -> Iterator[StoredInstance]:
        chosen = frozenset(wanted.sop_instance_uids)
        single = wanted.sop_instance_uids[0] if len(chosen) == 1 else None
        for series_uid in wanted.series_uids or (None,):
            if self.given_up():
                return
            here = self.archive.instances(study_uid, series_uid, single, scope=self.scope)
            for each in (*here, *self._elsewhere(here, study_uid, series_uid, single)):
                if not chosen or each.head.sop_instance_uid in chosen:
                    yield each

    def _elsewhere(self, here: Sequence[StoredInstance], study_uid: str, series_uid: str | None,
                   sop_instance_uid: str | None) -> Sequence[StoredInstance]:
        """What the region has beside; its bytes are not here."""
        if self.window is None:
            return ()
        known = {each.head.sop_instance_uid for each in here}
        try:
            found = self.window.instances(self.principal, study_uid, series_uid, sop_instance_uid)
        except NotFound:
            return ()
        except Unavailable as error:
            if self.whole or not here:
                raise
            log.warning("a retrieve of %s goes on with what is here: %s", self.principal.user, error)
            return ()
        return [replace(each, evicted=True) for each in found if each.head.sop_instance_uid not in known]
