"""The identity folder: atomic, private, and whole after a kill at any step."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from archive.errors import InvalidInput, SettingsError
from certs import identity as identities
from certs.authority import Authority
from certs.certificate import spki_fingerprint
from certs.identity import Assignment, Identity, Issued
from certs.profiles import Member

ASSIGNMENT = Assignment("San Martino", "Radiology", "HSM", ("127.0.0.1:7443", "hub2:7443"))
STEPS_MAX = 200


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.init(tmp_path / "ca", "Liguria")


def issue(authority: Authority, folder: Path, purpose: str = "first") -> Issued:
    key = identities.pending_key(folder, purpose)
    certificate = authority.issue(Member.node("liguria", "san-martino/radiology"), key.public_key())
    bundle = authority.bundle
    return Issued(certificate.pem + bundle.issuing_pem, bundle.roots_pem, bundle.version, ASSIGNMENT)


def test_an_identity_reads_back_as_it_was_installed(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    assert not identities.exists(folder)
    installed = identities.install(folder, issue(authority, folder))
    held = Identity.load(folder)
    assert held == installed
    assert (held.uri, held.ward) == ("spiffe://liguria/node/san-martino/radiology", "san-martino/radiology")
    assert (held.hospital, held.ward_name, held.issuer) == ("San Martino", "Radiology", "HSM")
    assert held.hub_addresses == ("127.0.0.1:7443", "hub2:7443") and held.hub_address == "127.0.0.1:7443"
    assert not (folder / "pending").exists()
    assert "PRIVATE" not in repr(held)


def test_only_the_owner_reads_the_key(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    held = identities.install(folder, issue(authority, folder))
    assert stat.S_IMODE(held.key_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    held.key_path.chmod(0o640)
    os.utime(held.key_path.parent)  # as after a copy: read anew
    with pytest.raises(SettingsError, match="read by others"):
        Identity.load(folder)


def test_a_key_waits_for_its_certificate_under_one_purpose(tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    first = spki_fingerprint(identities.pending_key(folder, "invite 1").public_key())
    assert spki_fingerprint(identities.pending_key(folder, "invite 1").public_key()) == first
    assert spki_fingerprint(identities.pending_key(folder, "invite 2").public_key()) != first


def test_a_certificate_for_another_key_is_not_installed(authority: Authority, tmp_path: Path) -> None:
    foreign = issue(authority, tmp_path / "other")
    identities.pending_key(tmp_path / "identity")
    with pytest.raises(InvalidInput, match="not for the key"):
        identities.install(tmp_path / "identity", foreign)
    with pytest.raises(SettingsError, match="enrol first"):
        Identity.load(tmp_path / "identity")


def test_a_staged_identity_counts_only_after_the_switch(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    old = identities.install(folder, issue(authority, folder))
    staged = identities.stage(folder, issue(authority, folder, "renewal"))
    assert identities.latest(old) == old
    identities.switch(staged, drop_older=True)
    assert identities.latest(old) == staged
    assert sorted(os.listdir(folder / "generations")) == [staged.generation]


def dies_at(step: int, work: Callable[[], object]) -> bool:
    """Runs `work` in a child that ends, as by kill -9, before its n-th step on the disk; whether it did."""
    child = os.fork()
    if child == 0:
        left = [step]

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return real(*arguments, **named)
            return call

        try:
            for name in ("open", "rename", "symlink", "mkdir", "fsync", "unlink", "rmdir"):
                setattr(os, name, counted(getattr(os, name)))
            work()
            os._exit(0)
        finally:  # nothing of the parent's is run, whatever happened
            os._exit(1)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, 9), "the work itself failed"
    return ended == 9


def test_killed_at_every_step_of_a_renewal_there_is_a_matching_pair(
    authority: Authority, tmp_path: Path
) -> None:
    folder = tmp_path / "identity"
    identities.install(folder, issue(authority, folder))
    survived: set[str] = set()
    for step in range(STEPS_MAX):
        def renewal() -> None:
            identities.switch(identities.stage(folder, issue(authority, folder, "renewal")), drop_older=True)

        before = Identity.load(folder)
        died = dies_at(step, renewal)
        after = Identity.load(folder)  # raises when key and certificate do not match
        survived.add("old" if after.fingerprint == before.fingerprint else "new")
        if not died:
            break
    assert step > 15, "the steps were not reached"
    assert survived == {"old", "new"}
    assert not died
    assert not [name for name in os.listdir(folder) if name.startswith(".generation")]


def test_killed_at_every_step_of_a_first_install_it_can_be_done_again(
    authority: Authority, tmp_path: Path
) -> None:
    step = 0
    while True:
        folder = tmp_path / f"identity-{step}"

        def first_install(folder: Path = folder) -> None:
            identities.install(folder, issue(authority, folder))

        died = dies_at(step, first_install)
        assert identities.install(folder, issue(authority, folder)) == Identity.load(folder)
        if not died:
            break
        step += 1
        assert step < STEPS_MAX
    assert step > 10
