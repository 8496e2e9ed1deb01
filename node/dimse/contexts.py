"""Owns which SOP classes and transfer syntaxes the node takes, and presentation contexts: how the acceptor
answers them (PS3.8 9.3.3.2) and how the requestor plans them. It never knows who asks; admission says what a
device may."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import pynetdicom.sop_class as known_classes
from pydicom._uid_dict import UID_dictionary

from archive.model import is_uid
from node.dimse.association import Context
from node.dimse.pdu import (
    CONTEXTS_MAX,
    AnsweredContext,
    AssociateAccept,
    AssociateRequest,
    ContextResult,
    ProposedContext,
    Role,
)

VERIFICATION = "1.2.840.10008.1.1"
PATIENT_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.1.1"
PATIENT_ROOT_MOVE = "1.2.840.10008.5.1.4.1.2.1.2"
PATIENT_ROOT_GET = "1.2.840.10008.5.1.4.1.2.1.3"
STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
STUDY_ROOT_MOVE = "1.2.840.10008.5.1.4.1.2.2.2"
STUDY_ROOT_GET = "1.2.840.10008.5.1.4.1.2.2.3"
PATIENT_STUDY_ONLY_FIND = "1.2.840.10008.5.1.4.1.2.3.1"  # retired, and what old machines speak
PATIENT_STUDY_ONLY_MOVE = "1.2.840.10008.5.1.4.1.2.3.2"
PATIENT_STUDY_ONLY_GET = "1.2.840.10008.5.1.4.1.2.3.3"
STORAGE_COMMITMENT = "1.2.840.10008.1.20.1"  # the push model
WORKLIST_FIND = "1.2.840.10008.5.1.4.31"
PERFORMED_STEP = "1.2.840.10008.3.1.2.3.3"
PERFORMED_STEP_RETRIEVE = "1.2.840.10008.3.1.2.3.4"
INSTANCE_AVAILABILITY = "1.2.840.10008.5.1.4.33"
IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
_STANDARD_ROOT = "1.2.840.10008."
_STORAGE_ROOT = "1.2.840.10008.5.1.4.1.1."
_MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"  # a DICOMDIR: of media, never sent

_VIDEO_CLASSES = frozenset(_STORAGE_ROOT + tail for tail in ("77.1.1.1", "77.1.2.1", "77.1.4.1"))

# Hanging protocols, palettes, implant templates, protocols, inventories: a service class of its own (PS3.4
# GG), whose objects belong to no study. There is no place for them here, so they are not agreed on.
_WITHOUT_A_PATIENT = frozenset(known_classes._NON_PATIENT_OBJECT_CLASSES.values())

# Syntaxes whose data sets do not carry their own pixels, or are no data sets.
_NOT_IN_STREAM = frozenset((
    "1.2.840.10008.1.2.4.94", "1.2.840.10008.1.2.4.95",  # JPIP
    "1.2.840.10008.1.2.4.204", "1.2.840.10008.1.2.4.205",  # JPIP with HTJ2K
    "1.2.840.10008.1.2.6.1", "1.2.840.10008.1.2.6.2", "1.2.840.10008.1.20",  # MIME, XML, Papyrus 3
    "1.2.840.10008.1.2.7.1", "1.2.840.10008.1.2.7.2", "1.2.840.10008.1.2.7.3",  # SMPTE ST 2110: real time
))
# In the standard since 2025, not yet in pydicom's dictionary: Deflated Image Frame Compression, JPEG XL.
_NEWER_SYNTAXES = frozenset((
    "1.2.840.10008.1.2.8.1", "1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.4.111", "1.2.840.10008.1.2.4.112",
))


class ServiceName(Enum):
    """The services of a node; the values are what a device's list of services says."""

    ECHO = "echo"
    STORE = "store"
    FIND = "find"
    RETRIEVE = "retrieve"  # C-MOVE and C-GET
    COMMIT = "commit"
    WORKLIST = "worklist"
    MPPS = "mpps"


_SERVICE_OF: Mapping[str, ServiceName] = {
    VERIFICATION: ServiceName.ECHO,
    **dict.fromkeys((PATIENT_ROOT_FIND, STUDY_ROOT_FIND, PATIENT_STUDY_ONLY_FIND), ServiceName.FIND),
    **dict.fromkeys((PATIENT_ROOT_MOVE, STUDY_ROOT_MOVE, PATIENT_STUDY_ONLY_MOVE,
                     PATIENT_ROOT_GET, STUDY_ROOT_GET, PATIENT_STUDY_ONLY_GET), ServiceName.RETRIEVE),
    STORAGE_COMMITMENT: ServiceName.COMMIT,
    WORKLIST_FIND: ServiceName.WORKLIST,
    PERFORMED_STEP: ServiceName.MPPS,
    PERFORMED_STEP_RETRIEVE: ServiceName.MPPS,
}
_OF_OBJECTS = frozenset((ServiceName.ECHO, ServiceName.STORE))  # their data sets are passed on as they are


def _is_storage(uid: str, name: str, kind: str, retired: str) -> bool:
    if kind != "SOP Class" or uid == _MEDIA_DIRECTORY or "Storage Commitment" in name:
        return False
    return "Storage" in name or (not name and bool(retired) and uid.startswith(_STORAGE_ROOT))


def _storage_classes() -> frozenset[str]:
    """Every storage SOP class of the standard, the retired ones too: old archives are migrated with them."""
    classes = {uid for uid, (name, kind, _, retired, _) in UID_dictionary.items()
               if _is_storage(uid, name, kind, retired)}
    newer = set(known_classes._STORAGE_CLASSES.values())  # than the dictionary
    return frozenset(classes | newer) - _WITHOUT_A_PATIENT


STORAGE_CLASSES = _storage_classes()
STORAGE_SYNTAXES = frozenset(
    uid for uid, entry in UID_dictionary.items() if entry[1] == "Transfer Syntax"
) - _NOT_IN_STREAM | _NEWER_SYNTAXES
# Identifiers are read and written as data sets, so only in the syntaxes that need no codec (PS3.5 10).
IDENTIFIER_SYNTAXES = frozenset((IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG))

# C-FIND SCP, by item byte (PS3.4 Table C.5-2): relational queries, combined date and time, fuzzy matching of
# names, timezone adjustment; no conversion of enhanced multi-frame images; empty values, multiple values.
QUERY_SUPPORT = bytes((1, 1, 1, 1, 0, 1, 1))

# Storage SCP of level 2 (full), signature level 3 (bit-preserving), no coercion (PS3.4 Table B.3-1).
STORAGE_SUPPORT = bytes((2, 0, 3, 0, 0, 0))


@dataclass(frozen=True, slots=True)
class Offer:
    """What a node takes. `private` adds private SOP classes and transfer syntaxes, and storage classes that
    are newer than our tables (AS6). `requestor_serves` are the services whose SCP a requestor may be on its
    own association: storage for C-GET, commitment for who reports on what was forwarded to it."""

    private: bool = False
    requestor_serves: frozenset[ServiceName] = frozenset()

    def service(self, sop_class_uid: str) -> ServiceName | None:
        """The service that takes this abstract syntax."""
        if sop_class_uid in STORAGE_CLASSES:
            return ServiceName.STORE
        if (service := _SERVICE_OF.get(sop_class_uid)) is not None:
            return service
        if self.private and is_uid(sop_class_uid) and sop_class_uid not in UID_dictionary:
            private = not sop_class_uid.startswith(_STANDARD_ROOT)
            return ServiceName.STORE if private or sop_class_uid.startswith(_STORAGE_ROOT) else None
        return None

    def takes_syntax(self, service: ServiceName, transfer_syntax_uid: str) -> bool:
        if service not in _OF_OBJECTS:
            return transfer_syntax_uid in IDENTIFIER_SYNTAXES
        if transfer_syntax_uid in STORAGE_SYNTAXES:
            return True
        return (self.private and service is ServiceName.STORE and is_uid(transfer_syntax_uid)
                and not transfer_syntax_uid.startswith(_STANDARD_ROOT))


@dataclass(frozen=True, slots=True)
class Permitted:
    """What one device may ask for. Empty `sop_classes` and `transfer_syntaxes` are all that the node takes;
    verification is everybody's."""

    services: frozenset[ServiceName]
    sop_classes: frozenset[str] = frozenset()
    transfer_syntaxes: frozenset[str] = frozenset()

    def takes_class(self, service: ServiceName, sop_class_uid: str) -> bool:
        return service is not ServiceName.STORE or not self.sop_classes or sop_class_uid in self.sop_classes

    def takes_syntax(self, service: ServiceName, transfer_syntax_uid: str) -> bool:
        return (service is not ServiceName.STORE or not self.transfer_syntaxes
                or transfer_syntax_uid in self.transfer_syntaxes)

    def narrowed(self, service: ServiceName, role: Role) -> Role:
        """What it gets of the roles that it asks for: as SCP of storage it receives what it retrieves, which
        is another right than to store, and its lists of what it may send do not count."""
        as_scu = service in self.services and self.takes_class(service, role.sop_class_uid)
        serves = ServiceName.RETRIEVE if service is ServiceName.STORE else service
        return Role(role.sop_class_uid, role.scu and as_scu, role.scp and serves in self.services)


def negotiate(request: AssociateRequest, offer: Offer, permitted: Permitted, max_pdu_bytes: int, *,
              operations_max: int = 1) -> tuple[AssociateAccept, dict[int, Context]]:
    """Answer every proposed context (the first transfer syntax that the requestor names and we take), and
    what else it negotiates."""
    roles = _answer_roles(request.roles, offer, permitted)
    answers: list[AnsweredContext] = []
    contexts: dict[int, Context] = {}
    for proposed in request.contexts:
        asked = roles.get(proposed.abstract_syntax)
        role = asked or _default_role(proposed.abstract_syntax, offer, permitted)
        answer = _answer(proposed, offer, permitted, role)
        answers.append(answer)
        if answer.result == ContextResult.ACCEPTANCE:
            contexts[answer.id] = Context(answer.id, proposed.abstract_syntax, answer.transfer_syntax,
                                          role.scu, role.scp)
    accepted = {context.abstract_syntax for context in contexts.values()}
    accept = AssociateAccept(
        request.called_ae, request.calling_ae, tuple(answers), max_pdu_bytes,
        roles=tuple(role for uid, role in roles.items() if uid in accepted),
        extended=_answer_extended(request.extended, offer, accepted),
        asynchronous_window=_answer_window(request.asynchronous_window, operations_max, offer),
        as_received=request.as_received,
    )
    return accept, contexts


def _answer(proposed: ProposedContext, offer: Offer, permitted: Permitted, role: Role) -> AnsweredContext:
    # A refused context still carries one transfer syntax, which is not looked at (PS3.8 9.3.3.2).
    first = proposed.transfer_syntaxes[0] if proposed.transfer_syntaxes else IMPLICIT_LITTLE
    ignored = first if is_uid(first) else IMPLICIT_LITTLE
    service = offer.service(proposed.abstract_syntax)
    if service is None or not (role.scp or permitted.takes_class(service, proposed.abstract_syntax)):
        return AnsweredContext(proposed.id, ContextResult.ABSTRACT_SYNTAX_NOT_SUPPORTED, ignored)
    if not (role.scu or role.scp):
        return AnsweredContext(proposed.id, ContextResult.USER_REJECTION, ignored)
    for uid in _preferred(proposed, role):
        if offer.takes_syntax(service, uid) and (not role.scu or permitted.takes_syntax(service, uid)):
            return AnsweredContext(proposed.id, ContextResult.ACCEPTANCE, uid)
    return AnsweredContext(proposed.id, ContextResult.TRANSFER_SYNTAXES_NOT_SUPPORTED, ignored)


def _preferred(proposed: ProposedContext, role: Role) -> Sequence[str]:
    """The proposed syntaxes in our order: as the requestor names them. Where it is the SCP alone, so that a
    C-GET is to send there, a native one comes first: everything but video can be recoded to that, and nothing
    to another."""
    if role.scu or not role.scp or proposed.abstract_syntax in _VIDEO_CLASSES:
        return proposed.transfer_syntaxes
    native = [uid for uid in (EXPLICIT_LITTLE, IMPLICIT_LITTLE) if uid in proposed.transfer_syntaxes]
    return [*native, *proposed.transfer_syntaxes]


def _answer_roles(roles: Sequence[Role], offer: Offer, permitted: Permitted) -> dict[str, Role]:
    """By SOP class, of the roles that the requestor proposes those that it gets: never more than it asked for
    (PS3.7 D.3.3.4). The first proposal for a class counts. Who gets neither role has no use for a context."""
    answered: dict[str, Role] = {}
    for role in roles:
        service = offer.service(role.sop_class_uid)
        if service is not None:
            served = Role(role.sop_class_uid, role.scu, role.scp and service in offer.requestor_serves)
            answered.setdefault(role.sop_class_uid, permitted.narrowed(service, served))
    return answered


def _default_role(sop_class_uid: str, offer: Offer, permitted: Permitted) -> Role:
    """SCU, where none is proposed (PS3.7 D.3.3.4) and the device may."""
    service = offer.service(sop_class_uid)
    asked = Role(sop_class_uid, scu=True, scp=False)
    return asked if service is None else permitted.narrowed(service, asked)


def _answer_window(asked: tuple[int, int] | None, operations_max: int,
                   offer: Offer) -> tuple[int, int] | None:
    """Answered only when asked; 0 is unlimited (PS3.7 D.3.3.3). Ourselves we invoke several operations where
    C-GET is served."""
    if asked is None:
        return None
    invokes = operations_max if ServiceName.STORE in offer.requestor_serves else 1
    return min(asked[0] or operations_max, operations_max), min(asked[1] or invokes, invokes)


def _answer_extended(asked: Sequence[tuple[str, bytes]], offer: Offer,
                     accepted: set[str]) -> tuple[tuple[str, bytes], ...]:
    """What we support of what is asked about, once for each class (PS3.7 D.3.3.5): of queries never more than
    was asked for, since what is answered with 1 is done then (PS3.4 C.5.1.1)."""
    answers: dict[str, bytes] = {}
    for uid, information in asked:
        service = offer.service(uid) if uid in accepted else None
        if service is ServiceName.STORE:
            answers[uid] = STORAGE_SUPPORT
        elif service is ServiceName.FIND and information:
            pairs = zip(information, QUERY_SUPPORT, strict=False)
            answers.setdefault(uid, bytes(theirs == 1 and ours for theirs, ours in pairs))
    return tuple(answers.items())


def plan(pairs: Iterable[tuple[str, str]]) -> list[tuple[ProposedContext, ...]]:
    """Presentation contexts for (SOP class, transfer syntax) pairs: one context for each, as a context is
    answered with one syntax only; a further set where an association's 128 are used up (each is one
    association)."""
    sets: list[tuple[ProposedContext, ...]] = []
    unique = list(dict.fromkeys(pairs))
    for at in range(0, len(unique), CONTEXTS_MAX):
        sets.append(tuple(ProposedContext(2 * number + 1, sop_class, (syntax,))
                          for number, (sop_class, syntax) in enumerate(unique[at:at + CONTEXTS_MAX])))
    return sets


def plan_classes(
    classes: Iterable[tuple[str, Sequence[str], Sequence[str]]],
) -> list[tuple[ProposedContext, ...]]:
    """Presentation contexts for (SOP class, syntaxes that its objects are stored in, others that they can be
    recoded to): one for each of the former, one for all of the latter, so that what is taken as it is stored
    goes so. The contexts of a class stay in one set, but where they fill one."""
    wanted: list[list[tuple[str, tuple[str, ...]]]] = [[]]
    for sop_class, stored, others in classes:
        room = CONTEXTS_MAX - bool(others)
        for at in range(0, len(stored), room):
            contexts: list[tuple[str, tuple[str, ...]]] = [
                (sop_class, (syntax,)) for syntax in stored[at:at + room]]
            if others:
                contexts.append((sop_class, tuple(others)))
            if len(wanted[-1]) + len(contexts) > CONTEXTS_MAX:
                wanted.append([])
            wanted[-1] += contexts
    return [tuple(ProposedContext(2 * number + 1, sop_class, syntaxes)
                  for number, (sop_class, syntaxes) in enumerate(each)) for each in wanted if each]


def agreed(proposed: Sequence[ProposedContext], answers: Sequence[AnsweredContext],
           roles: Sequence[Role] = ()) -> Mapping[int, Context]:
    """The contexts that the acceptor took, and the roles that it answered. An answer with a syntax that was
    not proposed counts as refused; a role that is not answered was not taken (PS3.7 D.3.3.4)."""
    by_id = {context.id: context for context in proposed}
    by_class = {role.sop_class_uid: role for role in roles}
    contexts: dict[int, Context] = {}
    for answer in answers:
        asked = by_id.get(answer.id)
        if asked is None or answer.result != ContextResult.ACCEPTANCE:
            continue
        if answer.transfer_syntax in asked.transfer_syntaxes:
            role = by_class.get(asked.abstract_syntax, Role(asked.abstract_syntax, scu=True, scp=False))
            contexts[answer.id] = Context(answer.id, asked.abstract_syntax, answer.transfer_syntax, role.scu,
                                          role.scp)
    return contexts
