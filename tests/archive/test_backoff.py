"""Pauses between tries: they double, are never past the longest, and spread."""

from __future__ import annotations

import random

from archive.backoff import Backoff


def test_pauses_double_up_to_the_longest_and_spread_over_half_of_each() -> None:
    backoff = Backoff(10.0, 60.0, random.Random(4))
    for failures, whole_s in ((1, 10.0), (2, 20.0), (3, 40.0), (4, 60.0), (5, 60.0), (100_000, 60.0)):
        pauses = [backoff.pause_s(failures) for _ in range(200)]
        assert all(whole_s / 2 <= pause <= whole_s for pause in pauses)
        assert max(pauses) - min(pauses) > whole_s / 3
    assert 5_000_000 <= backoff.pause_us(1) <= 10_000_000
