"""Keys within sequences: what matches, what is answered and what is refused, whatever an identifier has."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archive.dataset.jsonsets import from_octets
from archive.dataset.jsonwriting import encoded
from archive.dataset.nestedkeys import answered, asks, fits, keys_of
from archive.errors import InvalidQuery, MissError
from node.dimse.contexts import IMPLICIT_LITTLE
from tests.node.worklists import as_json, query, worklist_item

ITEM = as_json(worklist_item(1))


def sq(*items: dict[str, Any]) -> dict[str, Any]:
    return {"vr": "SQ", "Value": list(items)}


def element(vr: str, *values: Any) -> dict[str, Any]:
    return {"vr": vr, "Value": list(values)}


CODES = {"00400008": sq({"00080100": element("SH", "X"), "00080102": element("SH", "L")},
                        {"00080100": element("SH", "Y"), "00080102": element("SH", "M")})}


@pytest.mark.parametrize(("asked", "is_match"), [
    ({"00400008": sq({"00080100": element("SH", "X"), "00080102": element("SH", "L")})}, True),
    ({"00400008": sq({"00080100": element("SH", "X"), "00080102": element("SH", "M")})}, False),
    ({"00400008": sq({"00080100": element("SH", "")})}, True),
    ({"00400008": sq({})}, True),
    ({"00400008": {"vr": "SQ"}}, True),
    ({"00321064": sq({"00080100": element("SH", "X")})}, False),
    ({"00321064": sq({"00080100": {"vr": "SH"}})}, True),
])
def test_one_item_matches_all_keys_of_the_key_s_item(asked: dict[str, Any], is_match: bool) -> None:
    assert fits(keys_of(asked), CODES) is is_match


def test_what_is_asked_for_is_answered_and_nothing_else() -> None:
    keys = keys_of({"00080005": element("CS", "ISO_IR 100"), "00400008": sq({"00080100": {"vr": "SH"}}),
                    "00100010": {"vr": "PN"}, "00321064": sq({"00080100": {"vr": "SH"}}),
                    "00400000": {"vr": "UL"}})
    assert answered(keys, CODES) == {
        "00400008": sq({"00080100": element("SH", "X")}, {"00080100": element("SH", "Y")}),
        "00100010": {"vr": "PN"}, "00321064": {"vr": "SQ"},
    }
    assert not asks(keys)


def test_ranges_of_one_event_are_one_span_where_that_is_said() -> None:
    asked = {"00400002": element("DA", "20260705-20260707"), "00400003": element("TM", "1000-1800")}
    at_night = {"00400002": element("DA", "20260706"), "00400003": element("TM", "0300")}
    assert fits(keys_of(asked, combined=[("00400002", "00400003")]), at_night)
    assert not fits(keys_of(asked), at_night)
    assert answered(keys_of(asked, combined=[("00400002", "00400003")]), at_night) == at_night


def test_bounds() -> None:
    with pytest.raises(InvalidQuery):
        keys_of({f"0010{n:04X}": {"vr": "LO"} for n in range(1, 600)})
    nested: dict[str, Any] = {"00100010": {"vr": "PN"}}
    for _ in range(10):
        nested = {"00400100": sq(nested)}
    with pytest.raises(InvalidQuery):
        keys_of(nested)
    with pytest.raises(InvalidQuery):
        keys_of({"00400100": sq({}, {})})


QUERY = encoded(as_json(query({"Modality": "CT", "ScheduledProcedureStepStartDate": "20261101-"},
                              PatientName="Ro*")), IMPLICIT_LITTLE)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(QUERY) - 1), st.integers(0, 255)), min_size=1, max_size=5))
def test_whatever_an_identifier_holds_it_is_answered_or_refused(changes: list[tuple[int, int]]) -> None:
    octets = bytearray(QUERY)
    for place, value in changes:
        octets[place] = value
    try:
        keys = keys_of(from_octets(bytes(octets), IMPLICIT_LITTLE), combined=[("00400002", "00400003")])
    except MissError:
        return
    fits(keys, ITEM)
    answer = encoded(answered(keys, ITEM), IMPLICIT_LITTLE)
    assert len(from_octets(answer, IMPLICIT_LITTLE)) <= len(keys.keys) + 1
