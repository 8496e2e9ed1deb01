"""How many push streams run: more on lines of which one connection takes little, few on fast ones."""

from __future__ import annotations

import pytest

from federation.flows import FIRST, Flows


def after(flows: Flows, seconds: float, *, rate: float, share: float) -> int:
    """So many stream-seconds of messages of 100 KB, of which this share was waiting."""
    now_s, size = 0.0, 100_000
    while now_s < seconds:
        took_s = size / rate
        now_s += took_s
        flows.wrote(size, took_s * share, took_s * (1 - share), now_s)
    return flows.running


@pytest.mark.parametrize(
    ("rate", "share", "seconds", "running"),
    [
        (0.4e6, 0.98, 1.6, 2 * FIRST),
        (0.4e6, 0.98, 60, 7),
        (2.5e6, 0.4, 60, FIRST),  # it waits for its own disk
        (300e6, 0.9, 20, FIRST),
    ],
)
def test_streams_are_added_while_they_wait(rate: float, share: float, seconds: float, running: int) -> None:
    assert after(Flows(7), seconds, rate=rate, share=share) == running


def test_another_line_begins_with_few() -> None:
    flows = Flows(7)
    after(flows, 60, rate=0.4e6, share=0.98)
    flows.begin()
    assert flows.running == FIRST
    assert Flows(1).running == 1
