"""Accept headers as DICOMweb clients really send them."""

from __future__ import annotations

import pytest

from archive.errors import InvalidQuery
from portal.negotiate import (
    DICOM,
    DICOM_JSON,
    OCTETS,
    NotAcceptable,
    accepted,
    first,
    forbid_mixture,
    split,
)


def test_the_viewers_unquoted_type_is_read() -> None:
    (found,) = accepted("multipart/related; type=application/octet-stream; transfer-syntax=*")
    assert (found.is_multipart, found.part, found.transfer_syntax) == (True, OCTETS, "*")
    assert found.takes(OCTETS) and not found.takes(DICOM)


def test_quotes_hold_separators() -> None:
    header = (
        'multipart/related; type="application/dicom"; x="a,b;\\"c"; transfer-syntax=1.2, application/json'
    )
    first_range, second = accepted(header)
    assert (first_range.part, first_range.transfer_syntax, second.media) == (DICOM, "1.2", "application/json")
    assert split('a;"b;c";d', ";") == ["a", '"b;c"', "d"]


def test_weights_order_and_zero_refuses() -> None:
    ranges = accepted("image/png;q=0.2, image/jpeg;q=0.9, text/html;q=0, application/dicom+json;q=nonsense")
    assert [r.media for r in ranges] == ["image/jpeg", "image/png"]
    assert first(ranges, [("image/png", 1), ("image/jpeg", 2)]) == (ranges[0], 2)
    assert first(ranges, [("text/html", 1)]) is None


def test_wildcards() -> None:
    anything, images = accepted("*/*, image/*")
    assert anything.takes(DICOM_JSON) and images.takes("image/jls") and not images.takes(DICOM)


def test_no_accept_is_not_acceptable_and_the_parameter_stands_in() -> None:
    with pytest.raises(NotAcceptable):
        accepted(None)
    (found,) = accepted(None, "image/jpeg")
    assert found.media == "image/jpeg"


def test_bounds_and_mixture() -> None:
    with pytest.raises(InvalidQuery):
        accepted("a" * 5_000)
    with pytest.raises(InvalidQuery):
        accepted(", ".join(f"a/b{i}" for i in range(100)))
    with pytest.raises(InvalidQuery):
        forbid_mixture(accepted("application/dicom+json, image/jpeg"))
    forbid_mixture(accepted("application/dicom+json, multipart/related; type=application/octet-stream"))
