"""Who asks, signed: a portal of this region alone can say it, and only for a minute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from archive.errors import Forbidden, MissError, NotAuthenticated
from federation.assertion import LIFE_S, LIFE_S_MAX, Assertion, sign, verify
from federation.policy import Principal, Role
from tests.federation.regions import Region, make_region

WHO = Principal("anna", Role.TECHNICIAN, "san-martino/radiology", "treatment")


def now_us(region: Region) -> int:
    return region.portal().certificate.issued_us + 60_000_000


def checked(region: Region, assertion: Assertion, at_us: int | None = None) -> Principal:
    roots = region.authority.bundle.roots_pem
    return verify(assertion, roots, region.authority.region, now_us(region) if at_us is None else at_us)


def test_what_was_signed_is_who_asks(region: Region) -> None:
    assert checked(region, sign(WHO, region.portal(), now_us(region))) == WHO
    plain = Principal("eva", Role.PHYSICIAN)
    assert checked(region, sign(plain, region.portal(), now_us(region))) == plain


@pytest.mark.parametrize(
    "change",
    [
        {"user": "eva"},
        {"role": "regional physician"},
        {"ward": "galliera/ct"},
        {"purpose": "research"},
        {"signature": b"0" * 70},
        {"chain": ()},
        {"user": "anna" + "ward technician", "role": ""},
        {"purpose": "x" * 300},
    ],
)
def test_a_changed_field_is_refused(region: Region, change: dict[str, object]) -> None:
    signed = sign(WHO, region.portal(), now_us(region))
    with pytest.raises(NotAuthenticated):
        checked(region, replace(signed, **change))  # type: ignore[arg-type]


def test_it_expires_and_can_not_be_made_to_live_long(region: Region) -> None:
    start = now_us(region)
    signed = sign(WHO, region.portal(), start)
    assert checked(region, signed, start + (LIFE_S - 1) * 1_000_000) == WHO
    with pytest.raises(NotAuthenticated, match="expired"):
        checked(region, signed, start + LIFE_S * 1_000_000)
    with pytest.raises(NotAuthenticated, match="too long"):
        checked(region, sign(WHO, region.portal(), start, life_s=LIFE_S_MAX + 1), start)


def test_a_node_can_not_say_who_asks(region: Region) -> None:
    node = region.node(region.add_ward("San Martino", "Radiology", "SM"), "127.0.0.1:1")
    with pytest.raises(NotAuthenticated, match="portal"):
        checked(region, sign(WHO, node, now_us(region)))


def test_a_portal_of_another_region_can_not_say_it(region: Region, tmp_path: Path) -> None:
    for name in ("elsewhere", region.authority.region):  # the second has our name and another root
        (tmp_path / f"other-{name}").mkdir()
        other = make_region(tmp_path / f"other-{name}", name)
        with pytest.raises(NotAuthenticated):
            checked(region, sign(WHO, other.portal(), now_us(region)))


def test_a_role_that_nobody_knows_may_do_nothing(region: Region) -> None:
    portal = region.portal()
    signed = sign(WHO, portal, now_us(region))
    unknown = replace(signed, role="archivist")
    with pytest.raises(MissError) as caught:
        checked(region, unknown)
    assert type(caught.value) in (NotAuthenticated, Forbidden)


def test_fields_can_not_run_into_each_other() -> None:
    one = Assertion("ab", "c", "", "", 1, b"", ())
    other = Assertion("a", "bc", "", "", 1, b"", ())
    assert one.canonical != other.canonical
