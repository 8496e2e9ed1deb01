"""Owns C-FIND (PS3.4 C.4.1) over the node's own archive: it reads the identifier, holds the query to its
model's hierarchy, and sends the matches one by one until it is cancelled. It never matches anything itself:
the archive does, with the engine that QIDO-RS uses too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Semaphore
from typing import TYPE_CHECKING

from archive.budget import ByteBudget
from archive.catalog import BY_KEYWORD
from archive.dataset import attributes
from archive.errors import CannotUnderstand, InvalidQuery, OutOfResources
from archive.model import Level, Query
from federation.policy import Act, Principal, Reach, require
from node.dimse.association import Context
from node.dimse.contexts import PATIENT_ROOT_FIND
from node.dimse.exchange import Caller, Exchange
from node.dimse.identifiers import IDENTIFIER_BYTES_MAX, careful, read_identifier, write_identifier
from node.dimse.messages import Command
from node.dimse.services.regional import SearchWindow, Widened, widened
from node.dimse.status import CANCELLED, PENDING, PENDING_UNSUPPORTED_KEYS, SUCCESS

if TYPE_CHECKING:
    from archive.archive import Archive

SEARCHES_MAX = 4            # at once; the next one waits for its turn
SEARCH_WAIT_S = 30.0
MATCHES_HELD_MAX = 100_000  # of all devices together: about 1.5 KB each

_UNIQUE_KEYS = frozenset(("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"))
_ORDER = (Level.PATIENT, Level.STUDY, Level.SERIES, Level.IMAGE)


@dataclass(frozen=True, slots=True)
class Find:
    """C-FIND SCP, Study Root and Patient Root, hierarchical."""

    archive: Archive
    ward: str
    ae_title: str
    responses_max: int
    window: SearchWindow | None = None  # on the region, for devices that may look there
    held: ByteBudget = field(default_factory=lambda: ByteBudget(MATCHES_HELD_MAX))  # it counts matches here
    searching: Semaphore = field(default_factory=lambda: Semaphore(SEARCHES_MAX))

    def is_prompt(self, caller: Caller, command: Command) -> bool:
        return False

    def serve(self, exchange: Exchange, context: Context, command: Command) -> None:
        association = exchange.association
        if not command.has_dataset:
            raise CannotUnderstand("a C-FIND without an identifier")
        identifier = read_identifier(association.read_dataset(context, IDENTIFIER_BYTES_MAX),
                                     context.transfer_syntax)
        patient_root = context.abstract_syntax == PATIENT_ROOT_FIND
        level, keys, wanted, unsupported = careful(
            lambda: attributes.query_from_dataset(identifier, patient_root=patient_root))
        refuse_foreign_keys(level, keys, patient_root=patient_root)
        principal = exchange.caller.principal(self.ward)
        query = Query(level, keys, require(principal, Act.SEARCH), limit=self.responses_max + 1)
        status = PENDING_UNSUPPORTED_KEYS if unsupported else PENDING
        with self._matches(query, principal, exchange.caller) as found:
            matches = found.matches
            for match in matches[:self.responses_max]:
                if association.cancelled(command.message_id):
                    exchange.respond(context, command, CANCELLED)
                    return
                answer = attributes.to_dataset(match, wanted, level=level, retrieve_ae=self.ae_title)
                exchange.respond(context, command, status,
                                 dataset=write_identifier(answer, context.transfer_syntax))
        if len(matches) > self.responses_max:
            raise OutOfResources(f"more than {self.responses_max} matches: ask more narrowly")
        exchange.respond(context, command, SUCCESS, comment=found.comment(exchange.caller))

    @contextmanager
    def _matches(self, query: Query, principal: Principal, caller: Caller) -> Iterator[Widened]:
        """The matches, held while they are sent: peers that ask and do not read must not fill the memory."""
        if not self.searching.acquire(timeout=SEARCH_WAIT_S):
            raise OutOfResources("too many searches at once")
        try:
            found = Widened(self.archive.search(query))
        finally:
            self.searching.release()
        if self.window is not None and principal.reach is Reach.REGION:
            found = widened(self.window, principal, caller, query, found.matches)
        held = len(found.matches)
        if not self.held.take(held):
            raise OutOfResources("too many matches are on their way to other devices")
        try:
            yield found
        finally:
            self.held.give_back(held)


def refuse_foreign_keys(level: Level, keys: Sequence[tuple[str, str]], *, patient_root: bool) -> None:
    """Below its top level a query without negotiated extensions asks nothing of the higher levels but their
    unique keys (PS3.4 C.4.1.2.1). A Patient ID beside a Study Instance UID passes: many a workstation sends
    it."""
    above = {Level.PATIENT, *_ORDER[:_ORDER.index(level)]}
    if level is Level.PATIENT or (level is Level.STUDY and not patient_root):
        return  # the top; Study Root's STUDY level holds the patient's keys too (C.6.2.1)
    for keyword, _ in keys:
        entry = BY_KEYWORD.get(keyword)
        if entry is not None and entry.level in above and keyword not in _UNIQUE_KEYS:
            raise InvalidQuery(f"{keyword} is no key of the {level.value} level")
