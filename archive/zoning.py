"""Keys and answers whose dates and times are in a zone of their own (timezone query adjustment, PS3.4
C.5.1.1): what keys ask of rows, by the offset that is stored with each, and a match as that zone tells it.

A date is the day from midnight to midnight in the key's zone, so it becomes a range of date and time; a time
is the same moment of every day, and may wrap around midnight. A stored date without a time is not compared
on the days at the range's ends. Dates of birth are nobody's moments and stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from archive.folding import first_moment
from archive.model import Fields, Match
from archive.offsets import OFFSETS, is_offset, minutes_of, moved
from archive.predicates import AnyOf, Between, Moment, OneOf, Predicate, Zoned

OFFSET = "TimezoneOffsetFromUTC"
ADJUSTED = {
    "StudyDate": "StudyTime",
    "SeriesDate": "SeriesTime",
    "ContentDate": "ContentTime",
    "AcquisitionDate": "AcquisitionTime",
    "PerformedProcedureStepStartDate": "PerformedProcedureStepStartTime",
}

_DAY = 24 * 60
_DAYS_APART_MAX = 2  # between two zones: 26 hours
_TIMES = frozenset(ADJUSTED.values())


def zoned(predicates: Sequence[Predicate], offset: str) -> list[Predicate]:
    """The predicates, those of moments as they are meant in the zone of `offset`."""
    return [_zoned(predicate, offset) for predicate in predicates]


def _zoned(predicate: Predicate, offset: str) -> Predicate:
    if not isinstance(predicate, OneOf | Between | Moment):
        return predicate
    named = predicate.date if isinstance(predicate, Moment) else predicate.keyword
    if named in _TIMES:
        assert isinstance(predicate, Between)
        by_offset = [(there, _time_moved(predicate, _apart(offset, there))) for there in OFFSETS]
        return Zoned(OFFSET, tuple(by_offset), predicate, None)
    if named not in ADJUSTED:
        return predicate
    moment = predicate if isinstance(predicate, Moment) else _whole_days(predicate)
    try:
        pairs = tuple((there, _moment_moved(moment, _apart(offset, there))) for there in OFFSETS)
        return Zoned(OFFSET, pairs, predicate, _around(moment))
    except ValueError:
        return predicate  # a day that is in no calendar


def _apart(offset: str, there: str) -> int:
    """How many minutes clocks `there` are ahead."""
    return minutes_of(there) - minutes_of(offset)


def _whole_days(predicate: OneOf | Between) -> Moment:
    if isinstance(predicate, OneOf):
        lower = upper = predicate.values[0]
    else:
        lower, upper = predicate.lower, predicate.upper
    return Moment(predicate.keyword, ADJUSTED[predicate.keyword], (lower, ""), (upper, ""))


def _moment_moved(moment: Moment, minutes: int) -> Moment:
    """The same moments, said in a zone that is `minutes` ahead."""
    if not minutes:
        return moment
    lower, upper = moment.lower, moment.upper
    if lower[0]:
        date, time = moved(lower[0], _to_minutes(lower[1], "0000"), minutes)
        lower = (date, first_moment(time + lower[1][4:]))
    if upper[0]:
        date, time = moved(upper[0], _to_minutes(upper[1], "2359"), minutes)
        upper = (date, time + (upper[1][4:] or "60.999999"))
    return Moment(moment.date, moment.time, lower, upper)


def _around(moment: Moment) -> Predicate:
    """The days that it touches in whatever zone."""
    days = _DAYS_APART_MAX * _DAY
    lower = moved(moment.lower[0], "00", -days)[0] if moment.lower[0] else ""
    upper = moved(moment.upper[0], "00", days)[0] if moment.upper[0] else ""
    return Between(moment.date, lower, upper)


def _time_moved(predicate: Between, minutes: int) -> Predicate:
    if not minutes:
        return predicate
    first, last = predicate.lower, predicate.upper or "235960.999999"
    lower_days, lower = _clock(_to_minutes(first, "0000"), minutes)
    upper_days, upper = _clock(_to_minutes(last, ""), minutes)
    lower, upper = first_moment(lower + first[4:]), upper + last[4:]
    if lower_days == upper_days:
        return Between(predicate.keyword, lower, upper)
    return AnyOf((Between(predicate.keyword, lower, ""), Between(predicate.keyword, "", upper)))


def _clock(time: str, minutes: int) -> tuple[int, str]:
    """A time of day in hours and minutes, moved: how many days later, and what the clock says."""
    days, there = divmod(int(time[:2]) * 60 + int(time[2:4]) + minutes, _DAY)
    return days, f"{there // 60:02}{there % 60:02}"


def _to_minutes(time: str, unknown: str) -> str:
    return time[:4].ljust(4, "0") if time else unknown


def in_zone(match: Match, offset: str) -> Match:
    """The match with its dates and times as clocks at `offset` show them; as it is where its own offset is
    not known. A date without a time, or a time without a date, stays."""
    own = match.study.get(OFFSET, "")
    if not is_offset(own):
        return match
    minutes = _apart(own, offset)
    study = {**_told(match.study, minutes), OFFSET: offset}
    return replace(
        match, study=study, series=_told(match.series, minutes), instance=_told(match.instance, minutes)
    )


def _told(fields: Fields, minutes: int) -> Fields:
    told = dict(fields)
    for date, time in ADJUSTED.items():
        if fields.get(date) and fields.get(time):
            try:
                told[date], told[time] = moved(fields[date], fields[time], minutes)
            except ValueError:
                continue  # no date or no time: it is told as it came
    return told
