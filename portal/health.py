"""The region's health for those who keep it running, from the ledger and the source: links, backlogs,
certificates, clocks. No patient data reaches this module."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, tzinfo

from archive.ledger import CertificateRow, Ledger, WardState
from archive.model import ConflictRow, ConflictState, Ward
from federation.coverage import (
    CoverageState,
    Report,
    WardCoverage,
    clock_words,
    is_present,
    report_in,
    status_of,
)
from federation.source import Source
from federation.troubles import (
    CERTIFICATE_DAYS_MIN,
    DAY_US,
    FREE_BYTES_MIN,
    OLDEST_S_MAX,
    SKEW_S_MAX,
    duration_words,
    eta_s,
)
from portal.studies import ward_line


@dataclass(frozen=True, slots=True)
class WardRow:
    """A line of the wards page."""

    hospital: str
    name: str
    words: str
    tone: str
    pending: str
    seen: str


@dataclass(frozen=True, slots=True)
class ConflictLine:
    """A line of the conflicts on the wards page."""

    ward: str
    uid: str
    what: str
    device: str
    received: str


@dataclass(frozen=True, slots=True)
class HealthRow:
    """A line of the health page, in words."""

    name: str
    hospital: str
    link: str
    link_tone: str
    words: str
    tone: str
    backlog: str
    draining: str
    oldest: str
    receipt: str
    set_aside: str
    conflicts: str
    held: str
    elsewhere: str
    free: str
    certificate: str
    certificate_tone: str
    skew: str
    version: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Health:
    """The health page."""

    rows: tuple[HealthRow, ...]
    warnings: tuple[str, ...]
    caption: str
    now: str


def ward_row(ward: WardCoverage, now_us: int, zone: tzinfo) -> WardRow:
    line = ward_line(ward, now_us, zone, named=False)
    return WardRow(
        ward.hospital,
        ward.name,
        line.words,
        line.tone,
        f"{ward.pending:,}",
        clock_words(ward.seen_at_us, now_us, zone),
    )


def conflict_line(row: ConflictRow, now_us: int, zone: tzinfo) -> ConflictLine:
    what = "proposed correction" if row.state is ConflictState.PROPOSED else "other content"
    if row.kept_digest and row.study_uid != row.kept_study_uid:
        what += ", in another study"
    received = clock_words(row.received_at_us, now_us, zone)
    return ConflictLine(row.ward, row.sop_instance_uid, what, row.device, received)


def gather(source: Source, ledger: Ledger, now_us: int, zone: tzinfo) -> Health:
    """Everything the health page says; asks the ledger and the source, so it runs in a thread."""
    coverage = source.coverage()
    states, wards = ledger.ward_states(), {ward.id: ward for ward in ledger.wards()}
    certificates = newest_certificates(ledger.certificates())
    found = (
        _row(ward, wards.get(ward.ward), states.get(ward.ward), certificates.get(ward.ward), now_us, zone)
        for ward in coverage
    )
    rows = tuple(sorted(found, key=lambda row: (not row.warnings, row.hospital, row.name)))
    here = sum(is_here(ward, states.get(ward.ward), now_us) for ward in coverage)
    return Health(
        rows,
        tuple(f"{row.hospital} {row.name}: {words}" for row in rows for words in row.warnings),
        f"{len(rows)} ward{'' if len(rows) == 1 else 's'}, {here} connected",
        clock_words(now_us, now_us, zone),
    )


def newest_certificates(rows: list[CertificateRow]) -> dict[str, CertificateRow]:
    """By ward, its certificate that lasts longest; the wards whose every certificate is revoked keep that
    one."""
    newest: dict[str, CertificateRow] = {}
    for row in rows:
        if row.ward is None:
            continue
        known = newest.get(row.ward)
        if known is None or _rank(row) > _rank(known):
            newest[row.ward] = row
    return newest


def _rank(row: CertificateRow) -> tuple[bool, int]:
    return row.state != "revoked", row.not_after_us


def _row(
    ward: WardCoverage,
    named: Ward | None,
    state: WardState | None,
    certificate: CertificateRow | None,
    now_us: int,
    zone: tzinfo,
) -> HealthRow:
    line = ward_line(ward, now_us, zone, named=False)
    report = report_in(state) if state is not None else None
    present = is_here(ward, state, now_us)
    words, tone = certificate_words(certificate, report, now_us)
    status = status_of(named, state, now_us) if named is not None and state is not None else None
    left_s = eta_s(status) if status is not None else None
    oldest_s = (now_us - state.oldest_pending_us) / 1e6 if state and state.oldest_pending_us else 0.0
    return HealthRow(
        name=named.name if named else ward.name,
        hospital=ward.hospital,
        link=_link(ward, state, present, now_us, zone),
        link_tone="good" if present else "bad",
        words=line.words,
        tone=line.tone,
        backlog=_backlog(ward, state),
        draining=_draining(report, left_s) if ward.pending else "",
        oldest=duration_words(oldest_s) if oldest_s > 0 else "–",
        receipt=clock_words(state.last_receipt_us, now_us, zone) if state and state.last_receipt_us else "–",
        set_aside=f"{ward.set_aside:,}",
        conflicts=f"{report.conflicts:,}" if report else "–",
        held=f"{report.instances:,}" if report else "–",
        elsewhere=f"{report.evicted:,} in the region alone" if report and report.evicted else "",
        free=size_words(report.free_bytes) if report else "–",
        certificate=words,
        certificate_tone=tone,
        skew=skew_words(state.skew_us) if state and ward.seen_at_us else "–",
        version=state.version if state else "",
        warnings=tuple(_warnings(ward, state, report, present, tone, words, oldest_s)),
    )


def is_here(ward: WardCoverage, state: WardState | None, now_us: int) -> bool:
    """Whether the ward is there: by its last report, or because this portal stands on its node."""
    return ward.state is CoverageState.ANSWERED if state is None else is_present(state, now_us)


def _link(ward: WardCoverage, state: WardState | None, present: bool, now_us: int, zone: tzinfo) -> str:
    if present and state is not None:
        since = clock_words(state.attached_since_us, now_us, zone) if state.attached_since_us else ""
        return f"connected since {since}" if since else "connected"
    if present:
        return "this node"
    seen = clock_words(ward.seen_at_us, now_us, zone)
    return f"away since {seen}" if ward.seen_at_us else "never connected"


def _backlog(ward: WardCoverage, state: WardState | None) -> str:
    if not ward.pending:
        return "none"
    return f"{ward.pending:,} ({size_words(state.pending_bytes)})" if state else f"{ward.pending:,}"


def _draining(report: Report | None, left_s: float | None) -> str:
    """How fast the backlog goes, and when it will be gone."""
    if report is None or left_s is None:
        return "held back" if report is not None and report.hold else "not draining"
    return f"{size_words(int(report.rate_bytes_per_s))}/s, done in {duration_words(left_s)}"


def _warnings(
    ward: WardCoverage,
    state: WardState | None,
    report: Report | None,
    present: bool,
    certificate_tone: str,
    certificate: str,
    oldest_s: float,
) -> list[str]:
    found = []
    if not present:
        found.append("not connected" if ward.seen_at_us else "enrolled, never connected")
    if state is not None and state.lost_note:
        found.append(state.lost_note)
    if oldest_s > OLDEST_S_MAX:
        found.append(f"the oldest image has waited {duration_words(oldest_s)}")
    if ward.set_aside:
        found.append(f"{ward.set_aside:,} set aside: replication gave up on them")
    if certificate_tone == "bad":
        found.append(f"certificate {certificate}")
    if state is not None and abs(state.skew_us) > SKEW_S_MAX * 1e6:
        found.append(f"its clock is {state.skew_us / 1e6:+.0f} s off")
    if report is not None and report.damaged:
        found.append(f"{report.damaged:,} instances are damaged there")
    if report is not None and 0 < report.free_bytes < FREE_BYTES_MIN:
        found.append(f"{size_words(report.free_bytes)} left on its disk")
    return found


def certificate_words(row: CertificateRow | None, report: Report | None, now_us: int) -> tuple[str, str]:
    """How long a ward's certificate lasts; its own report is believed over the register: it may be
    renewed."""
    if row is not None and row.state == "revoked":
        return "revoked", "bad"
    not_after_us = max(row.not_after_us if row else 0, report.certificate_not_after_us if report else 0)
    if not not_after_us:
        return "–", "aware"
    days = (not_after_us - now_us) / DAY_US
    if days <= 0:
        return "expired", "bad"
    return f"{int(days)} day{'' if int(days) == 1 else 's'}", "bad" if days < CERTIFICATE_DAYS_MIN else "good"


def size_words(count: int) -> str:
    """Bytes as people read them."""
    size = float(count)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 1_000 or unit == "TB":
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1_000
    raise AssertionError("unreachable")


def skew_words(skew_us: int) -> str:
    """How far a clock is off; a tenth of a second is nothing."""
    return f"{skew_us / 1e6:+.1f} s" if abs(skew_us) >= 100_000 else "0 s"


def local_zone() -> tzinfo:
    """The time zone of this machine, which is the region's."""
    zone = datetime.now().astimezone().tzinfo
    assert zone is not None
    return zone
