"""`miss deliveries` at a region's folder: what waits, what failed and why, and trying it again."""

from __future__ import annotations

import json
from pathlib import Path

from archive.ledger import Delivery, DeliveryKey
from archive.model import Ward
from miss.ledgers import open_ledger
from miss.region import create_region
from tests.commands import miss

MARTINO, GALLIERA = "san-martino/radiology", "galliera/oncology"


def test_what_failed_is_shown_and_tried_again(tmp_path: Path) -> None:
    region = tmp_path / "region"
    create_region(region, "trial", host="localhost", port=7443, enrol_port=7444)
    keys = [DeliveryKey(MARTINO, GALLIERA, f"1.2.{number}", bytes(32)) for number in range(3)]
    with open_ledger(region) as ledger:
        for ward in (MARTINO, GALLIERA):
            ledger.add_ward(Ward(ward, "Hospital", "Ward", "ISSUER"))
        ledger.order_deliveries([Delivery(key, "ISSUER", "CT1", 10, 1) for key in keys], 1)
        ledger.ready_deliveries(keys[:2], 2)
        ledger.refuse_delivery(keys[0], "it does not\x1b[2J take from this one", 3, permanent=True)

    shown = json.loads(miss("deliveries", "ls", "--json", "--state", region).stdout)
    assert [(one["from_ward"], one["to_ward"], one["awaited"], one["ready"], one["failed"])
            for one in shown] == [(MARTINO, GALLIERA, 1, 1, 1)]  # fmt: skip
    listed = miss("deliveries", "failed", "--state", region).stdout
    assert "1.2.0" in listed and "1.2.1" not in listed and "given up" in listed
    assert r"it does not\x1b[2J take" in listed and "\x1b" not in listed  # another ward's words

    wrong = miss("deliveries", "retry", "--to", "no/ward", "--state", region)
    assert wrong.returncode != 0 and "no/ward" in wrong.stderr
    assert "tried again: 1" in miss("deliveries", "retry", "--to", GALLIERA, "--state", region).stderr
    with open_ledger(region) as ledger:
        assert {one.key for one in ledger.next_deliveries(GALLIERA, 9)} == set(keys[:2])
