"""What is asked of a population at study level, and how many studies each answer has: values are chosen so
that answers are as long in a large population as in a small one."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.population import DAYS, FIRST_DAY, Population

VALUES = 25        # different ones of each kind, asked in turn
PART_CHARS = 5     # of a name, for `*contains*`


@dataclass(frozen=True, slots=True)
class Question:
    """A matching key, its value, and how many studies match it."""

    keyword: str
    value: str
    matches: int


def questions(population: Population) -> dict[str, list[Question]]:
    """By kind."""
    studies = population.studies
    names = [study.patient_name for study in studies]
    prefixes = Counter(name[:length] for name in names for length in range(3, len(name)))
    parts = Counter(part for name in names for part in _parts(name))
    return {
        "Patient ID": _chosen("PatientID", Counter(study.patient_id for study in studies), 2),
        "name prefix": _chosen("PatientName", prefixes, 10, "{}*"),
        "*contains*": _chosen("PatientName", parts, 10, "*{}*"),
        "date range": _chosen("StudyDate", _periods([study.date for study in studies], 25), 25),
        "accession number": _chosen(
            "AccessionNumber", Counter(study.accession_number for study in studies), 1),
    }


def _chosen(keyword: str, counted: Counter[str], matches: int, form: str = "{}") -> list[Question]:
    """The values that match nearest to `matches` studies, from all over the alphabet."""
    ordered = sorted(counted, key=lambda value: (abs(counted[value] - matches), value))
    nearest = counted[ordered[0]] if ordered else 0
    best = [value for value in ordered if counted[value] == nearest]
    best = best if len(best) >= VALUES else ordered[:VALUES]
    step = max(1, len(best) // VALUES)
    return [Question(keyword, form.format(value), counted[value]) for value in best[::step][:VALUES]]


def _parts(name: str) -> set[str]:
    """Wherever they are in one of the name's components."""
    return {one[at:at + PART_CHARS] for one in name.split("^") for at in range(len(one) - PART_CHARS + 1)}


def _periods(dates: Sequence[str], matches: int) -> Counter[str]:
    """Periods of as many days as hold about `matches` studies."""
    each_day = Counter(dates)
    days = [(FIRST_DAY + datetime.timedelta(number)).strftime("%Y%m%d") for number in range(DAYS)]
    length = min(max(1, matches * DAYS // len(dates)), DAYS)
    return Counter({f"{days[at]}-{days[at + length - 1]}": _total(each_day, days[at:at + length])
                    for at in range(DAYS - length + 1)})


def _total(each_day: Counter[str], days: Iterable[str]) -> int:
    return sum(each_day[day] for day in days)
