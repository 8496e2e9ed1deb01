"""What a ward's answer lists when there is more than an answer holds."""

from __future__ import annotations

import pytest

from archive.model import Level, Match, SeriesHolding
from federation.asks import cut_to


def study(number: int, *series: int) -> Match:
    holdings = tuple(
        SeriesHolding(f"1.{number}.{place}", "CT", tuple(f"1.{number}.{place}.{uid}" for uid in range(count)))
        for place, count in enumerate(series)
    )
    return Match(Level.STUDY, "I", {}, {"StudyInstanceUID": f"1.{number}"}, instance_count=sum(series),
                 holdings=holdings)  # fmt: skip


def sizes(matches: object) -> list[int]:
    return [sum(len(one.sop_instance_uids) for one in match.holdings) for match in matches]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("most", "expected", "cut"), [
    (100, [5, 3, 4], [False, False, False]), (12, [5, 3, 4], [False, False, False]),
    (9, [5, 3, 1], [False, False, True]), (6, [4, 1, 1], [True, True, True]),
    (3, [1, 1, 1], [True, True, True]),
])  # fmt: skip
def test_a_long_answer_is_cut_and_names_every_study(most: int, expected: list[int], cut: list[bool]) -> None:
    matches = [study(1, 2, 3), study(2, 3), study(3, 1, 3)]
    found = cut_to(matches, most)
    assert sizes(found) == expected
    assert [match.truncated for match in found] == cut
    assert [match.instance_count for match in found] == [5, 3, 4]
