"""The members of a region and what a certificate of each may hold: one table of profiles, one form of name.

A member's identity is exactly one URI, `spiffe://<region>/<profile>/...`. Its DNS name is derived from that,
never chosen by whoever asks, and lies below the only domain the issuing CA may sign for. Knows no key.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from enum import Enum
from urllib.parse import quote

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from archive.errors import InvalidInput

SLUG_LENGTH_MAX = 40
INTERNAL_DOMAIN = "miss.internal"  # .internal is kept for private use (ICANN, 2024): resolves nowhere

DAY_S = 24 * 3600
ROOT_LIFE_S = 20 * 365 * DAY_S
ISSUING_LIFE_S = 5 * 365 * DAY_S
DEVICE_LIFE_S = 365 * DAY_S  # machines that people renew by hand; at most twice as long
DEVICE_LIFE_S_MAX = 2 * DEVICE_LIFE_S
DEVICE_MARK = "aet"
LEAF_LIFE_S = 30 * DAY_S  # at least three times the longest outage that is planned for
BACKDATE_S = 300          # for members whose clock is behind

_SLUG = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?", re.ASCII)


class Profile(Enum):
    """What a member is. The value is the first step of its URI's path."""

    NODE = "node"
    PORTAL = "portal"
    HUB = "hub"


@dataclass(frozen=True, slots=True)
class ProfileRule:
    """What a certificate of a profile holds. `steps` is how many names follow the profile in the URI."""

    steps: int
    usages: tuple[x509.ObjectIdentifier, ...]


# Members dial the hub and the hub dials nobody: nobody needs both usages.
RULES: dict[Profile, ProfileRule] = {
    Profile.NODE: ProfileRule(2, (ExtendedKeyUsageOID.CLIENT_AUTH,)),
    Profile.PORTAL: ProfileRule(1, (ExtendedKeyUsageOID.CLIENT_AUTH,)),
    Profile.HUB: ProfileRule(1, (ExtendedKeyUsageOID.SERVER_AUTH,)),
}


def slug(text: str) -> str:
    """`text` as a name that may stand in a URI and a DNS label: "San Martino" becomes "san-martino"."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    made = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:SLUG_LENGTH_MAX].rstrip("-")
    if not made:
        raise InvalidInput(f"{text!r} has no letter or digit to make a name of")
    return made


def region_domain(region: str) -> str:
    """The domain below which the region's issuing CA may sign, and nothing else."""
    return f"{region}.{INTERNAL_DOMAIN}"


def hub_dns_name(region: str) -> str:
    """The name that every hub's certificate holds and every client demands, whatever address it dialled.

    Safe although it says nothing of the address: only the region's own root is trusted, only a hub's profile
    gets this name and serverAuth, and it is what makes a hub reachable by IP, behind NAT or on loopback.
    """
    return f"hub.{region_domain(region)}"


def device_uri(region: str, ae_title: str, ward: str = "") -> str:
    """What a certificate says of a machine that speaks DICOM: its AE title, in one ward or in the region. No
    member's identity: it has no form of one, and nothing but DICOM TLS reads it."""
    place = f"{region}:{ward}" if ward else region
    return f"urn:miss:{place}:{DEVICE_MARK}:{quote(ae_title, safe='')}"


def is_device_uri(uri: str) -> bool:
    return uri.startswith("urn:miss:") and f":{DEVICE_MARK}:" in uri


@dataclass(frozen=True, slots=True)
class Member:
    """Who someone is in the region: profile and path, in slugs."""

    region: str
    profile: Profile
    path: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.path) != RULES[self.profile].steps:
            raise InvalidInput(f"a {self.profile.value} is named by {RULES[self.profile].steps} names")
        if not all(_SLUG.fullmatch(step) for step in (self.region, *self.path)):
            raise InvalidInput("a name in an identity is 1 to 40 lower-case letters, digits, inner hyphens")

    @classmethod
    def node(cls, region: str, ward: str) -> Member:
        """The node of `ward`, which is "hospital/ward" in slugs."""
        return cls(region, Profile.NODE, tuple(ward.split("/")))

    @classmethod
    def parse(cls, uri: str) -> Member:
        """The member that `uri` names; InvalidInput when it is not exactly of our form."""
        scheme, _, rest = uri.partition("://")
        region, *steps = rest.split("/")
        profiles = {profile.value: profile for profile in Profile}
        if scheme != "spiffe" or not steps or steps[0] not in profiles:
            raise InvalidInput("an identity has the form spiffe://<region>/<node|portal|hub>/<name>")
        return cls(region, profiles[steps[0]], tuple(steps[1:]))

    @property
    def uri(self) -> str:
        return "/".join((f"spiffe://{self.region}", self.profile.value, *self.path))

    @property
    def ward(self) -> str | None:
        """The ward whose node this is: "hospital/ward"."""
        return "/".join(self.path) if self.profile is Profile.NODE else None

    @property
    def dns_name(self) -> str:
        """hub.<region>.miss.internal for every hub; else the path backwards, below the region's domain."""
        if self.profile is Profile.HUB:
            return hub_dns_name(self.region)
        return ".".join((*reversed(self.path), self.profile.value, region_domain(self.region)))
