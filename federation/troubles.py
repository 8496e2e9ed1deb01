"""What of a ward a person has to look at, in words, and how long its backlog will take: the same for the
command, the page and whoever reads their JSON."""

from __future__ import annotations

from federation.coverage import WardStatus

DAY_US = 86_400 * 1_000_000
CERTIFICATE_DAYS_MIN = 3  # renewal is due at two thirds of life: fewer days left mean that it fails
SKEW_S_MAX = 30
OLDEST_S_MAX = 900
FREE_BYTES_MIN = 5 << 30


def oldest_s(status: WardStatus, now_us: int) -> float | None:
    """How long the oldest pending instance has waited; None when nothing is pending. Its time is by the
    ward's clock, and so is the age."""
    report = status.report
    if report is None or not report.oldest_pending_us or not status.coverage.pending:
        return None
    return max(0.0, (now_us + status.skew_us - report.oldest_pending_us) / 1e6)


def eta_s(status: WardStatus) -> float | None:
    """How long the backlog takes at the rate of now; None when it does not drain, or there is none."""
    report = status.report
    draining = report is not None and status.attached and report.rate_bytes_per_s > 0
    if report is None or not draining or not report.pending_bytes or not status.coverage.pending:
        return None
    return report.pending_bytes / report.rate_bytes_per_s


def certificate_days(status: WardStatus, now_us: int) -> float | None:
    report = status.report
    if report is None or not report.certificate_not_after_us:
        return None
    return (report.certificate_not_after_us - now_us) / DAY_US


def troubles(status: WardStatus, now_us: int) -> list[str]:
    """What needs a person; nothing when nothing does."""
    coverage, report = status.coverage, status.report
    found = []
    if not status.attached:
        found.append("not attached" if coverage.seen_at_us else "enrolled, never attached")
    if (waited_s := oldest_s(status, now_us)) is not None and waited_s > OLDEST_S_MAX:
        held = ", held back by its settings" if report is not None and report.hold else ""
        found.append(f"the oldest image has waited {duration_words(waited_s)}{held}")
    if coverage.set_aside:
        found.append(f"{coverage.set_aside:,} set aside: replication gave up on them")
    if (days := certificate_days(status, now_us)) is not None and days < CERTIFICATE_DAYS_MIN:
        over = days <= 0
        found.append("its certificate has expired" if over else f"its certificate ends in {days:.1f} days")
    if coverage.seen_at_us and abs(status.skew_us) > SKEW_S_MAX * 1e6:
        found.append(f"its clock is {status.skew_us / 1e6:+.0f} s off")
    if report is not None and 0 < report.free_bytes < FREE_BYTES_MIN:
        found.append(f"{report.free_bytes / 1e9:.1f} GB left on its disk")
    if report is not None and report.damaged:
        found.append(f"{report.damaged:,} instances are damaged there")
    return found


def duration_words(seconds: float) -> str:
    """A span in the unit that people would use: 40 s, 12 min, 5 h, 3 d."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
