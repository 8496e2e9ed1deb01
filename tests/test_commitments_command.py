"""`miss commitments` and the line of `miss node status`, from a node's ledger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from archive.ledger import CommitmentItem, Ledger
from archive.ledger.commitments import GIVEN_UP, SCP, SCU
from archive.settings import render_toml
from node.settings import NodeSettings
from tests.commands import miss
from tests.datasets import CT
from tests.federation.regions import make_region
from tests.node.processes import enrolled


@pytest.fixture
def settings(tmp_path: Path) -> NodeSettings:
    region = make_region(tmp_path / "region")
    made = enrolled(region, tmp_path, "127.0.0.1:1")
    region.ledger.close()
    (made.state / "node.toml").write_text(render_toml(made))
    return made


def test_requests_are_shown_with_what_became_of_them(settings: NodeSettings) -> None:
    ledger = Ledger.open(settings.ledger_url)
    ledger.open_commitment(SCP, "CT1", "2.25.1", {"1.1": CT, "1.2": CT})
    failed, _ = ledger.open_commitment(SCP, "MR1", "2.25.2", {"1.3": CT})
    ledger.note_items(failed.id, [CommitmentItem(CT, "1.3", 0x0112)])
    ledger.settle_commitment(failed.id)
    ledger.note_failed_try(failed.id, "no connection", 0)
    lost, _ = ledger.open_commitment(SCP, "MR1", "2.25.3", {"1.4": CT})
    ledger.end_commitment(lost.id, GIVEN_UP, "no connection")
    ledger.open_commitment(SCU, "PACS", "2.25.4", {"1.1": CT})
    ledger.close()
    listed = miss("commitments", "--state", settings.state)
    assert listed.returncode == 0, listed.stderr
    rows = listed.stdout.splitlines()
    assert len(rows) == 5
    assert "us, of PACS" in rows[1] and "to be asked" in rows[1]
    assert "MR1" in rows[3] and "to be reported" in rows[3] and "no connection" in rows[3]
    assert "CT1" in rows[4] and "being verified" in rows[4]
    only = json.loads(miss("commitments", "--failed", "--json", "--state", settings.state).stdout)
    assert [one["transaction_uid"] for one in only] == ["2.25.3", "2.25.2"]
    shown = miss("commitments", "2.25.2", "--state", settings.state).stdout
    assert "1.3" in shown and "0112 no such instance" in shown
    unknown = miss("commitments", "2.25.9", "--state", settings.state)
    assert unknown.returncode == 1 and "Traceback" not in unknown.stderr
