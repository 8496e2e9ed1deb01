"""What an answer includes, ward by ward. A ward's standing is a state machine over its reports, with no
clock and no disk of its own: `greeted`, `reported`, `departed` give the next state, the hub keeps it in the
ledger, and `coverage_of` reads it, in the hub or, when the hub is dead, in whoever has the ledger. It never
guesses: a ward that did not answer is named as such, and a lost disk stays on the page until a person clears
it.

`complete_to` is the hub's time at which the node began to look for the last report that said that everything
the ward had acknowledged had a receipt: a report that a bad line brought late says nothing of the time that
it was on the way. A ward that is away is covered as of then exactly when that report was its last.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, tzinfo
from enum import Enum

from archive.ledger import WardState
from archive.model import Ward

REPORT_INTERVAL_S = 5.0
# Three reports missed: the hub died with the ward attached, or the line hangs. Until then attached is
# attached.
STALE_AFTER_S = 3 * REPORT_INTERVAL_S
NOTE_LENGTH_MAX = 500


class CoverageState(Enum):
    """How much of a ward an answer includes. The values travel on the wire and in QIDO's header."""

    ANSWERED = "answered"  # asked just now for what is pending there, and it answered in full
    UP_TO_DATE = "up-to-date"  # attached, and everything it acknowledged is in the region
    AS_OF = "as-of"  # away, and at its last report everything was in the region
    INCOMPLETE = "incomplete"  # something is known to be missing
    UNKNOWN = "unknown"  # it never reported


@dataclass(frozen=True, slots=True)
class WardCoverage:
    """What an answer includes of one ward. `reason` says why it is not whole, in words for a page."""

    ward: str
    hospital: str
    name: str
    state: CoverageState
    complete_to_us: int | None = None
    pending: int = 0
    set_aside: int = 0
    seen_at_us: int | None = None
    reason: str = ""

    @property
    def covered(self) -> bool:
        """Whether nothing is known to be missing, up to `complete_to_us` at least."""
        return self.state in (CoverageState.ANSWERED, CoverageState.UP_TO_DATE, CoverageState.AS_OF)

    @property
    def title(self) -> str:
        return f"{self.hospital} {self.name}".strip()


@dataclass(frozen=True, slots=True)
class Report:
    """What a node says of itself, at least every `REPORT_INTERVAL_S`. `clock_us` is the node's own,
    `as_of_us` the hub's as the node knows it, never later; 0 from a node of an earlier release."""

    pending: int
    pending_bytes: int = 0
    oldest_pending_us: int | None = None
    set_aside: int = 0
    conflicts: int = 0
    instances: int = 0
    free_bytes: int = 0
    clock_us: int = 0
    certificate_not_after_us: int = 0
    rate_bytes_per_s: float = 0.0
    ae_title: str = ""
    hold: bool = False
    evicted: int = 0
    damaged: int = 0
    bytes: int = 0
    wire_ratio: float = 0.0
    as_of_us: int = 0


_REPORT_FIELDS = frozenset(field.name for field in fields(Report))


@dataclass(frozen=True, slots=True)
class WardStatus:
    """A ward as those who keep the region running see it; times are the hub's, None is never."""

    coverage: WardCoverage
    issuer: str
    attached: bool
    attached_since_us: int | None
    version: str
    skew_us: int
    report: Report | None
    last_receipt_us: int | None


@dataclass(frozen=True, slots=True)
class Asked:
    """How asking a ward went: `failure` says in plain words why it did not answer in full, and is empty
    otherwise.
    """

    failure: str = ""


def greeted(state: WardState | None, ward: str, *, epoch: bytes, version: str, now_us: int) -> WardState:
    """A node attached. A new epoch is a new disk: what the old one had not delivered may be lost, and is
    noted.
    """
    state = state or blank(ward)
    note = state.lost_note
    if state.epoch and state.epoch != epoch and state.seen_us:
        note = "; ".join(part for part in (note, _lost(state)) if part)[:NOTE_LENGTH_MAX]
        state = replace(state, pending=0, pending_bytes=0, oldest_pending_us=0, set_aside=0)
    return replace(
        state, epoch=epoch, lost_note=note, version=version, attached=True, attached_since_us=now_us
    )


def reported(state: WardState, report: Report, now_us: int) -> WardState:
    """A report came. Only one with nothing pending moves `complete_to`."""
    as_of_us = min(report.as_of_us or now_us, now_us)
    return replace(
        state,
        complete_to_us=as_of_us if report.pending == 0 else state.complete_to_us,
        pending=report.pending,
        pending_bytes=report.pending_bytes,
        oldest_pending_us=report.oldest_pending_us or 0,
        set_aside=report.set_aside,
        seen_us=now_us,
        skew_us=report.clock_us - now_us,
        report_json=json.dumps(asdict(report)),
    )


def departed(state: WardState) -> WardState:
    """The attach ended, for whatever reason."""
    return replace(state, attached=False, attached_since_us=0)


def receipted(state: WardState, now_us: int) -> WardState:
    """The ward was given a receipt."""
    return replace(state, last_receipt_us=now_us)


def cleared(state: WardState) -> WardState:
    """A person, or a reconciliation, settled what the old disk had lost."""
    return replace(state, lost_note="")


def blank(ward: str) -> WardState:
    """A ward that never reported."""
    return WardState(ward)


def report_in(state: WardState) -> Report | None:
    """The last report, as it was kept."""
    if not state.report_json:
        return None
    known = {name: value for name, value in json.loads(state.report_json).items() if name in _REPORT_FIELDS}
    return Report(**known)


def is_present(state: WardState, now_us: int) -> bool:
    """Whether the ward is there, as far as is known: attached, and not silent for three reports."""
    seen_us = max(state.seen_us, state.attached_since_us)
    return state.attached and now_us - seen_us <= STALE_AFTER_S * 1e6


def is_worth_asking(state: WardState | None, now_us: int) -> bool:
    """Only a ward that is there and holds what the region lacks is asked: nobody waits for the dead, or for
    nothing.
    """
    return state is not None and is_present(state, now_us) and state.pending > 0


def is_worth_searching(state: WardState | None, now_us: int) -> bool:
    """The same for a search: what was set aside does not come, and is found all the same."""
    return state is not None and is_present(state, now_us) and state.pending + state.set_aside > 0


def coverage_of(ward: Ward, state: WardState | None, now_us: int, asked: Asked | None = None) -> WardCoverage:
    """The ward's part of an answer; `asked` when it was asked for its pending instances."""
    if state is None or not state.seen_us:
        return WardCoverage(
            ward.id,
            ward.hospital,
            ward.name,
            CoverageState.UNKNOWN,
            reason="it has never reported",
        )
    standing, reason = _standing(state, now_us, asked)
    return WardCoverage(
        ward=ward.id,
        hospital=ward.hospital,
        name=ward.name,
        state=standing,
        complete_to_us=state.complete_to_us or None,
        pending=state.pending,
        set_aside=state.set_aside,
        seen_at_us=state.seen_us,
        reason=reason,
    )


def status_of(ward: Ward, state: WardState | None, now_us: int) -> WardStatus:
    """The whole of what is known of a ward."""
    known = state or blank(ward.id)
    return WardStatus(
        coverage=coverage_of(ward, state, now_us),
        issuer=ward.issuer,
        attached=is_present(known, now_us),
        attached_since_us=known.attached_since_us or None,
        version=known.version,
        skew_us=known.skew_us,
        report=report_in(known),
        last_receipt_us=known.last_receipt_us or None,
    )


def _standing(state: WardState, now_us: int, asked: Asked | None) -> tuple[CoverageState, str]:
    if state.lost_note:
        missing = asked.failure if asked is not None else ""
        return CoverageState.INCOMPLETE, "; ".join(part for part in (state.lost_note, missing) if part)
    if asked is not None:
        return (CoverageState.INCOMPLETE, asked.failure) if asked.failure else (CoverageState.ANSWERED, "")
    present = is_present(state, now_us)
    if state.pending > 0:
        where = "not yet here" if present else "still at the ward, which is away"
        return CoverageState.INCOMPLETE, f"{_instances(state.pending)} {where}"
    return (CoverageState.UP_TO_DATE if present else CoverageState.AS_OF), ""


def apart(coverage: WardCoverage) -> int:
    """How many instances are set aside at a ward that did not answer just now: an answer lacks them, though
    the ward counts as covered."""
    return 0 if coverage.state is CoverageState.ANSWERED else coverage.set_aside


def lacking(coverage: Iterable[WardCoverage], now_us: int, max_age_s: float) -> list[WardCoverage]:
    """The wards that an answer lacks: something of them is known to be missing, or what is known of them is
    older than `max_age_s`. One that is attached, or answered, is as of now."""
    oldest_us = now_us - int(max_age_s * 1e6)

    def is_lacking(one: WardCoverage) -> bool:
        too_old = one.state is CoverageState.AS_OF and (one.complete_to_us or 0) < oldest_us
        return not one.covered or too_old

    return [one for one in coverage if is_lacking(one)]


def plain_words(coverage: WardCoverage, now_us: int, zone: tzinfo = UTC) -> str:
    """One line for a page: `San Martino Radiology as of 10:31 UTC`."""
    when = clock_words(coverage.complete_to_us, now_us, zone)
    match coverage.state:
        case CoverageState.ANSWERED:
            words = f"{coverage.title} answered now"
        case CoverageState.UP_TO_DATE:
            words = f"{coverage.title} up to date"
        case CoverageState.AS_OF:
            words = f"{coverage.title} as of {when}"
        case CoverageState.UNKNOWN:
            words = f"{coverage.title} has never reported"
        case CoverageState.INCOMPLETE:
            since = f", complete as of {when}" if coverage.complete_to_us else ""
            words = f"{coverage.title} incomplete: {coverage.reason}{since}"
    return words + (f"; {_instances(coverage.set_aside)} set aside" if coverage.set_aside else "")


def clock_words(at_us: int | None, now_us: int, zone: tzinfo = UTC) -> str:
    """A time as people read it: the hour alone today, the day too otherwise, always with its zone."""
    if at_us is None:
        return "never"
    at, now = (datetime.fromtimestamp(us / 1e6, zone) for us in (at_us, now_us))
    return f"{at:%H:%M %Z}" if at.date() == now.date() else f"{at:%Y-%m-%d %H:%M %Z}"


def _lost(state: WardState) -> str:
    at_risk = state.pending + state.set_aside
    if at_risk:
        return f"up to {_instances(at_risk)} lost with the old disk"
    seen = datetime.fromtimestamp(state.seen_us / 1e6, UTC)
    return f"what arrived after {seen:%Y-%m-%d %H:%M %Z} may be lost with the old disk"


def _instances(count: int) -> str:
    return f"{count:,} instance{'' if count == 1 else 's'}"
