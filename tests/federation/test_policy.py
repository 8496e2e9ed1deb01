"""The decision function: each role and act by name, and that nothing is allowed by omission."""

from __future__ import annotations

import itertools

import pytest

from archive.errors import Forbidden
from archive.model import EVERYTHING, NOTHING, Scope
from federation.policy import Act, Principal, Role, decide, narrowed, require, role_named

OWN = "san-martino/radiology"
ALLOWED = {
    (Role.TECHNICIAN, Act.SEARCH): Scope(frozenset({OWN})),
    (Role.TECHNICIAN, Act.READ): Scope(frozenset({OWN})),
    (Role.PHYSICIAN, Act.SEARCH): EVERYTHING,
    (Role.PHYSICIAN, Act.READ): EVERYTHING,
    (Role.DEVICE, Act.SEARCH): Scope(frozenset({OWN})),
    (Role.DEVICE, Act.READ): Scope(frozenset({OWN})),
    (Role.IT, Act.HEALTH): NOTHING,
    (Role.IT, Act.ADMINISTER): NOTHING,
}


@pytest.mark.parametrize(("role", "act"), list(itertools.product(Role, Act)))
def test_each_role_and_act_is_decided_by_name(role: Role, act: Act) -> None:
    decision = decide(Principal("anna", role, OWN), act)
    assert decision.allowed == ((role, act) in ALLOWED)
    assert decision.scope == ALLOWED.get((role, act), NOTHING)
    assert decision.reason


@pytest.mark.parametrize("role", [Role.TECHNICIAN, Role.DEVICE])
def test_who_belongs_to_a_ward_and_has_none_sees_nothing(role: Role) -> None:
    for ward in (None, ""):
        decision = decide(Principal("anna", role, ward), Act.SEARCH)
        assert not decision.allowed
        assert not decision.scope.allows(OWN)


def test_it_reads_no_image_and_searches_no_name() -> None:
    for act in (Act.SEARCH, Act.READ):
        with pytest.raises(Forbidden, match="no images"):
            require(Principal("ugo", Role.IT), act)


def test_the_physicians_reason_says_that_care_relations_come_later() -> None:
    assert "care relations come later" in decide(Principal("eva", Role.PHYSICIAN), Act.READ).reason


def test_scopes_only_narrow() -> None:
    one, two = Scope(frozenset({"a", "b"})), Scope(frozenset({"b", "c"}))
    assert narrowed(one, two) == Scope(frozenset({"b"}))
    assert narrowed(EVERYTHING, one) == narrowed(one, EVERYTHING) == one
    assert narrowed(NOTHING, EVERYTHING) == NOTHING


def test_a_role_of_another_release_is_refused() -> None:
    assert role_named("regional IT") is Role.IT
    with pytest.raises(Forbidden):
        role_named("super user")
