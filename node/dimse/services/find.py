"""Owns C-FIND (PS3.4 C.4.1) over the node's own archive: it reads the identifier by its model and by what was
negotiated, and sends the matches one by one until it is cancelled. It never matches anything itself: the
archive does, with the engine that QIDO-RS uses too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from archive.budget import ByteBudget, SharedBudget
from archive.dataset.answers import Answers
from archive.dataset.questions import Model, Question, read_question
from archive.errors import CannotUnderstand, InvalidQuery, OutOfResources
from archive.model import Query, Rules
from archive.offsets import is_offset
from federation.policy import Act, Principal, Reach, require
from monitoring.measures import Distribution
from monitoring.tracing import traced
from node.dimse.association import Context
from node.dimse.contexts import (
    EXPLICIT_BIG,
    IMPLICIT_LITTLE,
    PATIENT_ROOT_FIND,
    PATIENT_STUDY_ONLY_FIND,
    QUERY_SUPPORT,
    STUDY_ROOT_FIND,
)
from node.dimse.exchange import Caller, Exchange
from node.dimse.identifiers import IDENTIFIER_BYTES_MAX, careful, read_identifier, received, room
from node.dimse.messages import Command
from node.dimse.services.regional import SearchWindow, Widened, widened
from node.dimse.services.suboperations import Turns
from node.dimse.status import (
    CANCELLED,
    CANNOT_UNDERSTAND,
    DOES_NOT_MATCH,
    OUT_OF_RESOURCES,
    PENDING,
    PENDING_UNSUPPORTED_KEYS,
    SUCCESS,
)

if TYPE_CHECKING:
    from archive.archive import Archive

SEARCHES_MAX = 4            # at once; the next one waits for its turn
SEARCHES_PER_DEVICE_MAX = 3  # so that a flood of one device leaves the others a turn
SEARCH_WAIT_S = 30.0
MATCHES_HELD_MAX = 100_000  # of all devices together: about 1.5 KB each
MATCHES_PER_DEVICE_MAX = 75_000  # of one: who asks and does not read must not have all of them
BATCH_BYTES = 16 << 10      # of responses that are sent in one write; a C-CANCEL is looked for before each

MODELS: Mapping[str, Model] = {
    PATIENT_ROOT_FIND: Model.PATIENT_ROOT,
    STUDY_ROOT_FIND: Model.STUDY_ROOT,
    PATIENT_STUDY_ONLY_FIND: Model.PATIENT_STUDY_ONLY,
}

# Extended negotiation by item byte, from 1: what may be asked for, and what is done then (empty: refused).
EXTENDED: tuple[tuple[str, str], ...] = (
    ("relational queries", "keys of any level above, and no unique keys of those levels"),
    ("date-time matching", "the ranges of a date and its time are one range"),
    ("fuzzy semantic matching of person names", "each word of the key begins a word of the name"),
    ("timezone query adjustment", "keys and answers in the zone of (0008,0201), where the stored is known"),
    ("enhanced multi-frame image conversion", ""),
    ("empty value matching", "a key of two quotation marks matches what has no value"),
    ("multiple value matching", "each of a key's values is to be there"),
)

STATUSES: Mapping[int, str] = {
    SUCCESS: "every match was sent; there may have been none",
    PENDING: "a match; every key was supported",
    PENDING_UNSUPPORTED_KEYS: "a match; some keys are not known here, or are told and not matched on",
    CANCELLED: "a C-CANCEL came; what was sent before it counts",
    OUT_OF_RESOURCES: "more matches than the node's bound (the first ones were sent), or too many searches at"
                      " once, or the index is behind",
    DOES_NOT_MATCH: "the level is missing or none of the model's, the hierarchy is not kept, or a value is"
                    " none of its VR's",
    CANNOT_UNDERSTAND: "there is no identifier, or it can't be read",
}


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What was agreed on beyond the baseline, from the acceptor's answer (PS3.4 Table C.5-2)."""

    relational: bool = False
    combined_datetime: bool = False
    fuzzy_names: bool = False
    timezone: bool = False
    enhanced_conversion: bool = False
    empty_values: bool = False
    multiple_values: bool = False

    @classmethod
    def of(cls, information: bytes) -> Negotiated:
        return cls(*(byte == 1 for byte in information[:len(QUERY_SUPPORT)]))

    def rules(self, question: Question) -> Rules:
        """How the keys match. A timezone is looked at only where it was agreed on."""
        zone = question.timezone if self.timezone else ""
        if zone and not is_offset(zone):
            raise InvalidQuery("Timezone Offset From UTC is written &ZZXX", "TimezoneOffsetFromUTC")
        return Rules(self.fuzzy_names, self.empty_values, self.multiple_values, zone)


@dataclass(frozen=True, slots=True)
class Find:
    """C-FIND SCP of the models above; hierarchical, unless relational queries were negotiated."""

    archive: Archive
    ward: str
    ae_title: str
    responses_max: int
    window: SearchWindow | None = None  # on the region, for devices that may look there
    held: SharedBudget = field(  # it counts matches here
        default_factory=lambda: SharedBudget(MATCHES_HELD_MAX, MATCHES_PER_DEVICE_MAX))
    receiving: ByteBudget = field(default_factory=room)
    searching: Turns = field(
        default_factory=lambda: Turns(SEARCHES_MAX, SEARCHES_PER_DEVICE_MAX, SEARCH_WAIT_S))
    seconds: Distribution = field(default_factory=Distribution)  # until the matches were found

    def is_prompt(self, caller: Caller, command: Command) -> bool:
        return False

    @traced("C-FIND")
    def serve(self, exchange: Exchange, context: Context, command: Command) -> None:
        association = exchange.association
        if not command.has_dataset:
            raise CannotUnderstand("a C-FIND without an identifier")
        with received(association, context, IDENTIFIER_BYTES_MAX, self.receiving) as octets:
            identifier = read_identifier(octets, context.transfer_syntax)
        negotiated = Negotiated.of(exchange.extended.get(context.abstract_syntax, b""))
        question = careful(lambda: read_question(identifier, MODELS[context.abstract_syntax],
                                                 relational=negotiated.relational))
        principal = exchange.caller.principal(self.ward)
        query = Query(question.level, question.keys, require(principal, Act.SEARCH),
                      combine_datetime=negotiated.combined_datetime, rules=negotiated.rules(question),
                      limit=self.responses_max + 1)
        status = PENDING_UNSUPPORTED_KEYS if question.unsupported else PENDING
        answers = Answers(question, self.ae_title, implicit=context.transfer_syntax == IMPLICIT_LITTLE,
                          little=context.transfer_syntax != EXPLICIT_BIG, timezone=query.rules.timezone)
        with self._matches(query, principal, exchange.caller, lambda: association.wire.stopping) as found:
            matches = found.matches
            exchange.settle()
            for responses in _batches(exchange.pending(context, command, status=status,
                                                       dataset=answers.encode(match))
                                      for match in matches[:self.responses_max]):
                if association.cancelled(command.message_id):
                    exchange.respond(context, command, CANCELLED)
                    return
                association.wire.send(responses)
        if len(matches) > self.responses_max:
            raise OutOfResources(f"more than {self.responses_max} matches: ask more narrowly")
        exchange.respond(context, command, SUCCESS, comment=found.comment(exchange.caller))

    @contextmanager
    def _matches(self, query: Query, principal: Principal, caller: Caller,
                 given_up: Callable[[], bool]) -> Iterator[Widened]:
        """The matches, held while they are sent: peers that ask and do not read must not fill the memory."""
        begun_s = time.perf_counter()
        self.archive.wait_indexed()  # before its turn: all that come meanwhile wait for the same batch
        with self.searching.of(caller.ae_title, given_up) as turn:
            if not turn:
                raise OutOfResources("too many searches at once")
            found = Widened(self.archive.index.search(query))
        if self.window is not None and principal.reach is Reach.REGION:
            found = widened(self.window, principal, caller, query, found.matches)
        self.seconds.observe(time.perf_counter() - begun_s)
        held = len(found.matches)
        if not self.held.take(caller.ae_title, held):
            raise OutOfResources("too many matches are on their way already")
        try:
            yield found
        finally:
            self.held.give_back(caller.ae_title, held)


def _batches(responses: Iterable[bytes]) -> Iterator[bytes]:
    """Responses by the packet: one write for each costs more than finding them."""
    batch = bytearray()
    for response in responses:
        batch += response
        if len(batch) >= BATCH_BYTES:
            yield bytes(batch)
            batch.clear()
    if batch:
        yield bytes(batch)
