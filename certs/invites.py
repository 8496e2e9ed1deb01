"""Invites: the one line that lets a new member in. It says where to enrol, who is expected there, and by a
secret who may come; its pins say which root to believe, so that trust needs no second channel.

    miss1.<address>.<id>.<secret>.<pin>[.<second pin>]      every part base64url, no padding; the id in hex

The ledger keeps the secret's hash alone. The name a certificate gets comes from the invite's row, never
from what the new member says of itself. Opens no connection.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
from dataclasses import dataclass

from archive.errors import InvalidInput
from archive.ledger import Invite, Ledger
from archive.model import Ward
from certs import registry
from certs.authority import Clock, clock_us
from certs.profiles import Member, Profile, slug

PREFIX = "miss1"
TEXT_LENGTH_MAX = 1024
SECRET_BYTES = 32
PINS_MAX = 2           # a second one while one root follows another
TRIES = 5
LIFE_S = 24 * 3600
NAME_LENGTH_MAX = 64   # DICOM's LO (PS3.5 6.2): an issuer is written to Issuer of Patient ID

_US = 1_000_000
_ID = re.compile(r"[0-9a-f]{16}", re.ASCII)


@dataclass(frozen=True, slots=True)
class InviteText:
    """What the line says. `address` is host:port of the enrolment port; `pins` are SHA-256 of roots' keys."""

    address: str
    id: str
    secret: str
    pins: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join((PREFIX, _encode(self.address.encode()), self.id, self.secret, *self.pins))

    @classmethod
    def parse(cls, text: str) -> InviteText:
        """Reads the line, white space of a copy and all; InvalidInput says what is wrong, not the secret."""
        text = "".join(text.split())
        parts = text.split(".")
        if len(text) > TEXT_LENGTH_MAX or parts[0] != PREFIX or not 5 <= len(parts) <= 4 + PINS_MAX:
            raise InvalidInput(f"not an invite: the whole line is needed, from {PREFIX}. to its last letter")
        _, address, invite_id, secret, *pins = parts
        try:
            address = _decode(address).decode()
            whole = len(_decode(secret)) == SECRET_BYTES and all(len(_decode(pin)) == 32 for pin in pins)
        except ValueError:
            whole = False
        if not whole or not _ID.fullmatch(invite_id):
            raise InvalidInput("the invite is damaged: copy the whole line again")
        split_address(address)
        return cls(address, invite_id, secret, tuple(pins))


def create_invite(
    ledger: Ledger, *, profile: Profile | str, hospital: str = "", ward: str, issuer: str = "", address: str,
    pin: str, life_s: int = LIFE_S, who: str = "ca", second_pin: str = "", clock: Clock = clock_us,
) -> str:
    """A one-time invite for a node of `ward` of `hospital`, or for the portal named `ward`; returns its line.

    `address` is the enrolment port as the new member reaches it. A ward joins the ledger's wards here; to
    invite it again (a new disk, a lapsed certificate) give it the same names.
    """
    profile = Profile(profile)
    split_address(address)
    invite_id, secret = secrets.token_hex(8), _encode(secrets.token_bytes(SECRET_BYTES))
    ward_id = _expect(ledger, profile, hospital.strip(), ward.strip(), issuer.strip())
    now_us = clock()
    ledger.add_invite(Invite(
        id=invite_id, secret_hash=hash_secret(secret), profile=profile.value, hospital=hospital.strip(),
        ward_name=ward.strip(), issuer=issuer.strip(), ward_id=ward_id, created_us=now_us,
        expires_us=now_us + life_s * _US, tries_left=TRIES,
    ))
    subject = f"{invite_id} {profile.value} {ward_id}"
    registry.audit(ledger, act="invite", subject=subject, who=who, clock=clock)
    return str(InviteText(address, invite_id, secret, (pin, second_pin) if second_pin else (pin,)))


def member_of(invite: Invite, region: str) -> Member:
    """Who the invite makes its bearer."""
    return Member(region, Profile(invite.profile), tuple(invite.ward_id.split("/")))


def hash_secret(secret: str) -> bytes:
    """What the ledger keeps. A plain hash does: the secret is 256 random bits, there is nothing to guess."""
    return hashlib.sha256(secret.encode()).digest()


def split_address(address: str) -> tuple[str, int]:
    """host and port of "host:port" or "[v6]:port"."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidInput("an address has the form host:port")
    return host, int(port)


def _expect(ledger: Ledger, profile: Profile, hospital: str, name: str, issuer: str) -> str:
    """The id of whom the invite is for; a ward is made known with it."""
    if max(map(len, (hospital, name, issuer))) > NAME_LENGTH_MAX:
        raise InvalidInput(f"hospital, ward and issuer have at most {NAME_LENGTH_MAX} characters")
    if profile is Profile.PORTAL:
        return slug(name)
    if profile is not Profile.NODE:
        raise InvalidInput("nodes and portals are invited; a hub's identity is made beside the authority")
    if not issuer or "\\" in issuer:
        raise InvalidInput("a ward needs the issuer of its Patient IDs, without a backslash (PS3.5 6.2)")
    wanted = Ward(f"{slug(hospital)}/{slug(name)}", hospital, name, issuer)
    known = ledger.ward(wanted.id)
    if known is None:
        ledger.add_ward(wanted)
    elif known != wanted:
        raise InvalidInput(
            f"{wanted.id} is {known.name!r} of {known.hospital!r} with issuer {known.issuer!r} already: "
            "give the same names, or other ones that make another id")
    return wanted.id


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError("not base64url") from error
