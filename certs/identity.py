"""A member's identity on its own disk: key, chain, roots and what the region told it about itself.

    folder/current -> generations/000002        one symlink decides which generation counts
    folder/generations/000002/key.pem (0600)  chain.pem  roots.pem  identity.json
    folder/pending/key.pem                      a key that waits for its certificate: asked again with the
                                                same key, the hub gives the same certificate again

Each generation is written whole and synced before it gets its name, and the symlink is switched by rename:
whoever is killed at any point finds a matching pair. The key never leaves this folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from archive.errors import InvalidInput, SettingsError
from certs import keyfiles
from certs.certificate import Certificate, key_pem, new_key, read_pem, spki_fingerprint
from certs.profiles import Profile

_GENERATION = re.compile(r"\d{6}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Assignment:
    """What an invite gave a member beside its certificate; empty for a hub."""

    hospital: str = ""
    ward_name: str = ""
    issuer: str = ""
    hub_addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Issued:
    """What came back for a pending key."""

    chain_pem: bytes
    roots_pem: bytes
    bundle_version: int
    assignment: Assignment = Assignment()


@dataclass(frozen=True, slots=True)
class Identity:
    """A member's identity as read from its folder. `issuer` is the assigning authority of its Patient IDs."""

    folder: Path
    generation: str
    key_pem: bytes = field(repr=False)
    chain_pem: bytes = field(repr=False)
    roots_pem: bytes = field(repr=False)
    bundle_version: int
    assignment: Assignment
    certificate: Certificate = field(repr=False)

    @classmethod
    def load(cls, folder: Path) -> Identity:
        """The current identity in `folder`; SettingsError when there is none or its parts do not match."""
        return _load(folder, _current(folder))

    @property
    def key_path(self) -> Path:
        """For servers that take files alone."""
        return self.folder / "generations" / self.generation / "key.pem"

    @property
    def current_roots_path(self) -> Path:
        """The roots of whichever generation is the current one."""
        return self.folder / "current" / "roots.pem"

    @property
    def chain_path(self) -> Path:
        return self.key_path.with_name("chain.pem")

    @property
    def uri(self) -> str:
        return self.certificate.member.uri

    @property
    def region(self) -> str:
        return self.certificate.member.region

    @property
    def profile(self) -> Profile:
        return self.certificate.member.profile

    @property
    def ward(self) -> str:
        """The ward's id, "hospital/ward"; empty for who is no node."""
        return self.certificate.member.ward or ""

    @property
    def hospital(self) -> str:
        return self.assignment.hospital

    @property
    def ward_name(self) -> str:
        return self.assignment.ward_name

    @property
    def issuer(self) -> str:
        return self.assignment.issuer

    @property
    def hub_addresses(self) -> tuple[str, ...]:
        return self.assignment.hub_addresses

    @property
    def hub_address(self) -> str:
        """The first hub's gRPC address; SettingsError for who was told none."""
        if not self.assignment.hub_addresses:
            raise SettingsError("this identity names no hub to dial")
        return self.assignment.hub_addresses[0]

    @property
    def fingerprint(self) -> str:
        return self.certificate.fingerprint

    @property
    def issued_us(self) -> int:
        return self.certificate.issued_us

    @property
    def not_after_us(self) -> int:
        return self.certificate.not_after_us


def exists(folder: Path) -> bool:
    return (folder / "current").is_symlink()


def latest(held: Identity) -> Identity:
    """`held` if it is still the current one in its folder, else what took its place; cheap when unchanged."""
    return _load(held.folder, _current(held.folder))


def pending_key(folder: Path, purpose: str = "first") -> ec.EllipticCurvePrivateKey:
    """The key that waits for a certificate for this purpose: the same one until it is installed or dropped.

    One that waited for another purpose (an invite that was never answered) is dropped for a new one.
    """
    keyfiles.make_private_folder(folder)
    pending = folder / "pending"
    try:
        if keyfiles.read(pending / "purpose") != purpose.encode():
            drop_pending(folder)
    except FileNotFoundError:
        drop_pending(folder)
    if not pending.exists():
        staging = folder / f".pending.{secrets.token_hex(4)}"
        staging.mkdir(mode=0o700)
        keyfiles.write_new(staging / "key.pem", key_pem(new_key()), keyfiles.PRIVATE)
        keyfiles.write_new(staging / "purpose", purpose.encode())
        keyfiles.sync_directory(staging)
        os.rename(staging, pending)
        keyfiles.sync_directory(folder)
    return _read_key(keyfiles.read_private(pending / "key.pem"))


def drop_pending(folder: Path) -> None:
    """Forgets the pending key."""
    _drop(folder / "pending", folder / f".pending.{secrets.token_hex(4)}")


def stage(folder: Path, issued: Issued) -> Identity:
    """Writes a new generation with the pending key, whole and synced, but leaves `current` alone."""
    pair = keyfiles.read_private(folder / "pending" / "key.pem")
    if _leaf(issued.chain_pem).spki != spki_fingerprint(_read_key(pair).public_key()):
        raise InvalidInput("the certificate is not for the key that asked for it")
    for name in _generations(folder):  # asked again for the same key, the hub gave the same certificate again
        with contextlib.suppress(SettingsError):
            if (known := _load(folder, name)).chain_pem == issued.chain_pem:
                return known
    generations = folder / "generations"
    keyfiles.make_private_folder(generations)
    staging = folder / f".generation.{secrets.token_hex(4)}"
    staging.mkdir(mode=0o700)
    keyfiles.write_new(staging / "key.pem", pair, keyfiles.PRIVATE)
    keyfiles.write_new(staging / "chain.pem", issued.chain_pem)
    keyfiles.write_new(staging / "roots.pem", issued.roots_pem)
    keyfiles.write_new(staging / "identity.json", _describe(issued))
    keyfiles.sync_directory(staging)
    name = f"{1 + max((int(old) for old in _generations(folder)), default=0):06d}"
    os.rename(staging, generations / name)
    keyfiles.sync_directory(generations)
    return _load(folder, name)


def switch(staged: Identity, *, drop_older: bool) -> Identity:
    """Makes `staged` the current generation; forgets the pending key and, when told to, older generations."""
    folder, name = staged.folder, staged.generation
    link = folder / f".current.{secrets.token_hex(4)}"
    link.symlink_to(Path("generations") / name)
    os.rename(link, folder / "current")
    keyfiles.sync_directory(folder)
    drop_pending(folder)
    if drop_older:
        for old in _generations(folder):
            if old != name:
                _drop(folder / "generations" / old, folder / f".generation.{secrets.token_hex(4)}")
    _sweep(folder)
    return staged


def install(folder: Path, issued: Issued, *, drop_older: bool = False) -> Identity:
    """Stages and switches at once: for a first certificate, or for one that needs no proof."""
    return switch(stage(folder, issued), drop_older=drop_older)


def _current(folder: Path) -> str:
    try:
        name = os.path.basename(os.readlink(folder / "current"))
    except FileNotFoundError as error:
        raise SettingsError(f"{folder} holds no identity yet: enrol first") from error
    if not _GENERATION.fullmatch(name):
        raise SettingsError(f"{folder}/current does not point to a generation")
    return name


def _generations(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(name for name in os.listdir(folder / "generations") if _GENERATION.fullmatch(name))
    return []


def _load(folder: Path, name: str) -> Identity:
    path = folder / "generations" / name
    try:
        made_ns = path.stat().st_mtime_ns
    except OSError as error:
        raise SettingsError(f"the identity in {path} can't be read: {error}") from error
    return _read(folder, name, made_ns)


@lru_cache(maxsize=64)  # a generation never changes, and `latest` is asked at every handshake
def _read(folder: Path, name: str, _made_ns: int) -> Identity:
    path = folder / "generations" / name
    try:
        described = json.loads(keyfiles.read(path / "identity.json"))
        pair = keyfiles.read_private(path / "key.pem")
        chain, roots = keyfiles.read(path / "chain.pem"), keyfiles.read(path / "roots.pem")
        certificate = _leaf(chain)
        matches = certificate.spki == spki_fingerprint(_read_key(pair).public_key())
        assignment = Assignment(
            hospital=str(described["hospital"]), ward_name=str(described["ward_name"]),
            issuer=str(described["issuer"]), hub_addresses=tuple(map(str, described["hub_addresses"])),
        )
        version = int(described["bundle_version"])
    except (OSError, ValueError, KeyError, TypeError, InvalidInput) as error:
        raise SettingsError(f"the identity in {path} can't be read: {error}") from error
    if not matches:
        raise SettingsError(f"the key in {path} is not the certificate's")
    return Identity(folder, name, pair, chain, roots, version, assignment, certificate)


def _describe(issued: Issued) -> bytes:
    leaf = _leaf(issued.chain_pem)
    return json.dumps({
        "uri": leaf.member.uri,
        "hospital": issued.assignment.hospital,
        "ward_name": issued.assignment.ward_name,
        "issuer": issued.assignment.issuer,
        "hub_addresses": list(issued.assignment.hub_addresses),
        "bundle_version": issued.bundle_version,
    }, indent=2, ensure_ascii=False).encode()


def _leaf(chain_pem: bytes) -> Certificate:
    try:
        x509.load_pem_x509_certificates(chain_pem)
    except ValueError as error:
        raise InvalidInput("the chain is not a sequence of certificates") from error
    return read_pem(chain_pem)


def _read_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SettingsError("a member's key is on the curve P-256")
    return key


def _drop(path: Path, aside: Path) -> None:
    """Removes a folder. Renamed first, so that half of it is never found under its name."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Removes what a killed process began and never named."""
    for entry in folder.iterdir():
        if entry.name.startswith(".generation.") or entry.name.startswith(".pending."):
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name.startswith(".current."):
            entry.unlink(missing_ok=True)
