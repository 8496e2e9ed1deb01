"""`miss ward` at a region's folder, where no hub runs."""

from __future__ import annotations

from pathlib import Path

from archive.ledger import WardState
from archive.model import Ward
from miss.ledgers import open_ledger
from miss.region import create_region
from tests.commands import miss

WARD = "san-martino/radiology"


def test_what_a_disk_lost_is_settled(tmp_path: Path) -> None:
    region = tmp_path / "region"
    create_region(region, "trial", host="localhost", port=7443, enrol_port=7444)
    with open_ledger(region) as ledger:
        ledger.add_ward(Ward(WARD, "San Martino", "Radiology", "SM"))
        ledger.put_ward_state(WardState(WARD, b"1", seen_us=5, lost_note="up to 3 instances lost"))
    wrong = miss("ward", "settle", "no/ward", "--state", region)
    assert wrong.returncode != 0 and "no/ward" in wrong.stderr
    assert "settled: up to 3 instances lost" in miss("ward", "settle", WARD, "--state", region).stderr
    with open_ledger(region) as ledger:
        assert ledger.ward_states()[WARD].lost_note == ""
        assert [row.act for row in ledger.audit_rows(limit=1)] != []
    assert "nothing of it counts as lost" in miss("ward", "settle", WARD, "--state", region).stderr
