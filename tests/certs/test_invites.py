"""The line of an invite, and what making one leaves in the ledger."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from archive.errors import InvalidInput
from archive.ledger import Ledger
from archive.model import Ward
from certs.invites import InviteText, create_invite
from certs.profiles import Profile

PIN = "bTGa5OM7cRV6M5FLwv_wECcWjp4olf9edtVhkVMfqPA"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


def invite(ledger: Ledger, **named: Any) -> InviteText:
    line = create_invite(ledger, **{
        "profile": "node", "hospital": "San Martino", "ward": "Radiology", "issuer": "HSM",
        "address": "hub.example.org:7444", "pin": PIN, "life_s": 60, **named})
    return InviteText.parse(line)


def test_an_invite_s_line_says_all_and_the_ledger_keeps_no_secret(ledger: Ledger, tmp_path: Path) -> None:
    text = invite(ledger)
    assert str(text).startswith("miss1.") and InviteText.parse(str(text)) == text
    assert (text.address, text.pins) == ("hub.example.org:7444", (PIN,))
    row = ledger.invite(text.id)
    assert row is not None
    assert row.secret_hash == hashlib.sha256(text.secret.encode()).digest()
    assert (row.ward_id, row.profile) == ("san-martino/radiology", "node")
    assert (row.state, row.tries_left) == ("open", 5)
    assert row.expires_us - row.created_us == 60_000_000
    assert ledger.wards() == [Ward("san-martino/radiology", "San Martino", "Radiology", "HSM")]
    assert [row.act for row in ledger.audit_rows()] == ["invite"]
    on_disk = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert text.id.encode() in on_disk and text.secret.encode() not in on_disk


def test_no_two_invites_are_alike(ledger: Ledger) -> None:
    first, second = invite(ledger), invite(ledger)
    assert first.id != second.id and first.secret != second.secret


def test_a_second_pin_is_carried(ledger: Ledger) -> None:
    assert invite(ledger, second_pin=PIN[::-1][1:] + "A").pins[0] == PIN
    assert len(invite(ledger, second_pin=PIN).pins) == 2


def test_white_space_of_a_copy_does_no_harm_and_damage_is_seen(ledger: Ledger) -> None:
    text = invite(ledger)
    line = str(text)
    assert InviteText.parse(f"  {line[:40]}\n   {line[40:]}\n") == text
    for damaged in ("", "miss1", line[:-10], line.replace("miss1.", "miss9."), line + ".x.y",
                    line + "x" * 2000, line.replace(text.secret, text.secret[:-4]),
                    line.replace(text.id, "../../etc/passwd")):
        with pytest.raises(InvalidInput) as caught:
            InviteText.parse(damaged)
        assert text.secret not in str(caught.value)


def test_a_ward_is_invited_again_under_its_own_names_alone(ledger: Ledger) -> None:
    invite(ledger)
    invite(ledger)
    with pytest.raises(InvalidInput, match="already"):
        invite(ledger, ward="RADIOLOGY")
    with pytest.raises(InvalidInput, match="already"):
        invite(ledger, issuer="OTHER")
    assert len(ledger.wards()) == 1


@pytest.mark.parametrize("named", [
    {"issuer": ""}, {"issuer": "A\\B"}, {"hospital": "---"}, {"ward": "x" * 65}, {"profile": "hub"},
    {"address": "hub.example.org"}, {"address": "hub.example.org:0"}, {"address": ":7444"},
])
def test_an_invite_that_could_not_work_is_not_made(ledger: Ledger, named: dict[str, str]) -> None:
    with pytest.raises(InvalidInput):
        invite(ledger, **named)
    assert ledger.invites() == [] and ledger.wards() == []


def test_a_portal_is_invited_by_its_name(ledger: Ledger) -> None:
    row = ledger.invite(invite(ledger, profile=Profile.PORTAL, ward="Main Portal", hospital="", issuer="").id)
    assert row is not None and (row.profile, row.ward_id) == ("portal", "main-portal")
    assert ledger.wards() == []
