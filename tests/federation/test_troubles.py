"""What of a ward needs a person, and when its backlog will be gone."""

from __future__ import annotations

from dataclasses import replace

from archive.model import Ward
from federation.coverage import Report, WardStatus, blank, departed, greeted, reported, status_of
from federation.troubles import DAY_US, certificate_days, eta_s, oldest_s, troubles

NOW_US = 1_760_000_000_000_000
WARD = Ward("san-martino/radiology", "San Martino", "Radiology", "SM")
WELL = Report(pending=0, clock_us=NOW_US, free_bytes=1 << 40, certificate_not_after_us=NOW_US + 20 * DAY_US)
BUSY = replace(WELL, pending=10, pending_bytes=50_000_000, oldest_pending_us=NOW_US - 60_000_000,
               rate_bytes_per_s=5e6)  # fmt: skip


def status(report: Report, *, attached: bool = True) -> WardStatus:
    state = reported(greeted(None, WARD.id, epoch=b"1", version="1", now_us=NOW_US), report, NOW_US)
    return status_of(WARD, state if attached else departed(state), NOW_US)


def test_a_ward_that_is_well_has_no_troubles_and_no_eta() -> None:
    assert troubles(status(WELL), NOW_US) == [] and eta_s(status(WELL)) is None
    assert oldest_s(status(WELL), NOW_US) is None


def test_a_backlog_that_drains_says_when_it_is_gone() -> None:
    assert eta_s(status(BUSY)) == 10.0 and oldest_s(status(BUSY), NOW_US) == 60.0
    assert troubles(status(BUSY), NOW_US) == []
    assert eta_s(status(replace(BUSY, rate_bytes_per_s=0.0))) is None
    assert eta_s(status(BUSY, attached=False)) is None


def test_the_age_is_by_the_wards_own_clock() -> None:
    behind_us = 3_600_000_000
    late = replace(BUSY, clock_us=NOW_US - behind_us, oldest_pending_us=NOW_US - behind_us - 60_000_000)
    assert oldest_s(status(late), NOW_US) == 60.0
    assert troubles(status(late), NOW_US) == ["its clock is -3600 s off"]


def test_each_trouble_is_named() -> None:
    ill = replace(BUSY, oldest_pending_us=NOW_US - 7_200_000_000, set_aside=2, free_bytes=1 << 30, damaged=3,
                  certificate_not_after_us=NOW_US + DAY_US, hold=True)  # fmt: skip
    assert troubles(status(ill, attached=False), NOW_US) == [
        "not attached", "the oldest image has waited 2 h, held back by its settings",
        "2 set aside: replication gave up on them", "its certificate ends in 1.0 days",
        "1.1 GB left on its disk", "3 instances are damaged there",
    ]  # fmt: skip
    assert troubles(status_of(WARD, blank(WARD.id), NOW_US), NOW_US) == ["enrolled, never attached"]
    assert certificate_days(status(ill), NOW_US) == 1.0
