"""The one decision function: who may do what, and on which wards. Every read path asks it, here and again at
the node that holds the images; nobody else decides. It never looks at a request or a database: what a
decision needs is in the principal.

Policy v0: a technician works on the own ward, and so does a device, unless the region lets its ward's devices
look further (`granted`); a regional physician reads everything (care relations come later); regional IT sees
the health and administers, and no images. What no rule allows is denied.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum

from archive.errors import Forbidden
from archive.model import EVERYTHING, NOTHING, Scope

USER_LENGTH_MAX = 128
PURPOSE_LENGTH_MAX = 256
EVERY_WARD = "*"  # in a list of wards


class Role(Enum):
    """What a person is, or a device. The values are written in the ledger, in assertions and on pages."""

    TECHNICIAN = "ward technician"
    PHYSICIAN = "regional physician"
    IT = "regional IT"
    DEVICE = "device"


PEOPLE = frozenset(Role) - {Role.DEVICE}  # who can have an account


class Reach(Enum):
    """How far a device looks. The values are the ledger's words (`archive/model.py`, DEVICE_REACHES)."""

    WARD = "ward"
    REGION = "region"


class Act(Enum):
    """What a person does. A search shows names, a read shows images."""

    SEARCH = "search"
    READ = "read"
    HEALTH = "health"
    ADMINISTER = "administer"


_IN_WORDS = {
    Act.SEARCH: "search for studies",
    Act.READ: "see images",
    Act.HEALTH: "see the region's health",
    Act.ADMINISTER: "administer the region",
}


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: a person, or a device by its AE title. `ward` is a technician's or device's own; `purpose` is
    kept in the audit log. `reach` is a device's: beyond its ward it is the region's word and nobody else's,
    see `granted`."""

    user: str
    role: Role
    ward: str | None = None
    purpose: str = "treatment"
    reach: Reach = Reach.WARD


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether the act is allowed, on which wards, and why, in words that a page may show."""

    allowed: bool
    scope: Scope
    reason: str


def decide(principal: Principal, act: Act) -> Decision:
    """The decision. A denial has the empty scope, so that a caller that forgets to look at `allowed` shows
    nothing.
    """
    match principal.role, act:
        case Role.TECHNICIAN, Act.SEARCH | Act.READ:
            if not principal.ward:
                return _denied("a technician belongs to a ward, and this one has none")
            return Decision(True, Scope(frozenset({principal.ward})), "a technician sees the own ward")
        case Role.PHYSICIAN, Act.SEARCH | Act.READ:
            return Decision(
                True, EVERYTHING, "a regional physician sees all wards; care relations come later"
            )
        case Role.DEVICE, Act.SEARCH | Act.READ:
            if not principal.ward:
                return _denied("a device belongs to a ward, and this one has none")
            if principal.reach is Reach.REGION:
                return Decision(True, EVERYTHING, "the region lets this ward's devices see all wards")
            return Decision(True, Scope(frozenset({principal.ward})), "a device sees the own ward")
        case Role.IT, Act.HEALTH | Act.ADMINISTER:
            return Decision(True, NOTHING, "regional IT keeps the region running, and sees no images")
        case Role.IT, _:
            return _denied("regional IT sees the region's health and no images")
        case _:
            return _denied(f"{principal.role.value}: not allowed to {_IN_WORDS[act]}")


def granted(principal: Principal, wards: Collection[str]) -> Principal:
    """The device as far as the region lets it look: `wards` are those whose devices may see all of it."""
    lets = principal.role is Role.DEVICE and (EVERY_WARD in wards or principal.ward in wards)
    return principal if lets else replace(principal, reach=Reach.WARD)


def reach_named(name: str) -> Reach:
    """The reach with this name; what this release does not know is the ward alone."""
    return Reach.REGION if name == Reach.REGION.value else Reach.WARD


def require(principal: Principal, act: Act) -> Scope:
    """The scope of an allowed act; raises Forbidden with the reason otherwise."""
    decision = decide(principal, act)
    if not decision.allowed:
        raise Forbidden(decision.reason)
    return decision.scope


def narrowed(scope: Scope, by: Scope) -> Scope:
    """The wards that both allow."""
    if scope.wards is None:
        return by
    if by.wards is None:
        return scope
    return Scope(scope.wards & by.wards)


def role_named(name: str) -> Role:
    """The role with this name; one that this release does not know may do nothing."""
    try:
        return Role(name)
    except ValueError:
        raise Forbidden("a role that this release does not know") from None


def _denied(reason: str) -> Decision:
    return Decision(False, NOTHING, reason)
