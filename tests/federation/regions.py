"""A region's certificates for the tests of this folder, made by our own authority and written in the
registry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from archive.ledger import CertificateRow, Ledger
from archive.model import Ward
from certs import identity as identities
from certs.authority import Authority, clock_us
from certs.certificate import Certificate
from certs.identity import Assignment, Identity, Issued
from certs.profiles import Member, Profile, slug


@dataclass
class Region:
    """An authority, a ledger, and who was given a certificate by them."""

    folder: Path
    authority: Authority
    ledger: Ledger
    issued: dict[str, Certificate] = field(default_factory=dict)

    @property
    def ca_folder(self) -> Path:
        return self.folder / "ca"

    @property
    def ledger_url(self) -> str:
        return f"sqlite:///{self.folder / 'ledger.db'}"

    def add_ward(self, hospital: str, name: str, issuer: str) -> Ward:
        ward = Ward(f"{slug(hospital)}/{slug(name)}", hospital, name, issuer)
        self.ledger.add_ward(ward)
        return ward

    def node(self, ward: Ward, hub_address: str, *, life_s: int = 30 * 86400) -> Identity:
        """The identity of a ward's node, as an invite would have given it."""
        assignment = Assignment(ward.hospital, ward.name, ward.issuer, (hub_address,))
        return self._member(Member.node(self.authority.region, ward.id), assignment, life_s)

    def portal(self, hub_address: str = "") -> Identity:
        assignment = Assignment(hub_addresses=(hub_address,) if hub_address else ())
        return self._member(Member(self.authority.region, Profile.PORTAL, ("main",)), assignment, 30 * 86400)

    def portal_of(self, *hub_addresses: str) -> Identity:
        """That of a portal whose invite named several hubs."""
        member = Member(self.authority.region, Profile.PORTAL, ("main",))
        return self._member(member, Assignment(hub_addresses=hub_addresses), 30 * 86400)

    def _member(self, member: Member, assignment: Assignment, life_s: int) -> Identity:
        folder = self.folder / "identities" / "-".join((member.profile.value, *member.path))
        folder.parent.mkdir(exist_ok=True)
        key = identities.pending_key(folder)
        certificate = self.authority.issue(member, key.public_key(), life_s=life_s)
        self.issued[member.uri] = certificate
        self.ledger.add_certificate(_row(certificate))
        bundle = self.authority.bundle
        chain = certificate.pem + bundle.issuing_pem
        return identities.install(folder, Issued(chain, bundle.roots_pem, bundle.version, assignment))


def _row(certificate: Certificate) -> CertificateRow:
    return CertificateRow(
        serial=certificate.serial,
        fingerprint=certificate.fingerprint,
        spki=certificate.spki,
        identity=certificate.member.uri,
        profile=certificate.member.profile.value,
        ward=certificate.member.ward,
        not_before_us=certificate.not_before_us,
        not_after_us=certificate.not_after_us,
        state="active",
        issued_us=clock_us(),
        reason="",
        der=certificate.der,
    )


def make_region(folder: Path, name: str = "liguria") -> Region:
    authority = Authority.init(folder / "ca", name)
    return Region(folder, authority, Ledger.open(f"sqlite:///{folder / 'ledger.db'}"))
