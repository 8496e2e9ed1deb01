"""`miss reconcile` and `miss scrub` as people type them, of folders whose process does not run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from archive.archive import Archive
from archive.model import Ward
from archive.settings import load
from archive.space.scrubber import Scrubber, ScrubNote
from federation.reconcile_notes import Alarm, Notes, Outcome
from miss.ledgers import open_ledger
from miss.region import create_region
from node.settings import NodeSettings
from tests.commands import miss
from tests.federation.regions import make_region


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """An enrolled node's folder, that was compared and read once."""
    region = make_region(tmp_path / "region")
    identity = region.node(region.add_ward("San Martino", "Radiology", "SANMARTINO"), "127.0.0.1:1")
    region.ledger.close()
    folder = tmp_path / "node"
    folder.mkdir()
    (folder / "node.toml").write_text(
        f'state = "{folder}"\nidentity = "{identity.folder}"\n[dimse]\nport = 1\nhost = "127.0.0.1"\n'
    )
    settings = load(NodeSettings, folder / "node.toml")
    with Archive.open(settings.archive_settings(), outbox=True) as archive:
        Scrubber(archive).run_pass(fast=True)
    return folder


def test_what_came_of_it_is_read_without_the_process(node: Path) -> None:
    alarm = Alarm("1.2.3", "00" * 32, "both lost it")
    last = Outcome("nightly", 1, 2, differing=1, alarms=1, listed_alarms=(alarm,))
    Notes(node).change(held=True, last=last)
    told = miss("reconcile", "--last", "--state", node)
    assert told.returncode == 1 and "1 need a person" in told.stdout
    assert "1.2.3: both lost it" in told.stderr and "nothing is evicted" in told.stderr
    note = json.loads(miss("scrub", "--json", "--state", node).stdout)
    assert note["full_us"] and note["full_found"] == 0


def test_only_a_process_has_a_line(node: Path) -> None:
    refused = miss("reconcile", "--state", node)
    assert refused.returncode == 1 and "does not run" in refused.stderr


def test_a_ward_that_the_region_does_not_know_is_named(tmp_path: Path) -> None:
    region = tmp_path / "region"
    create_region(region, "trial", host="localhost", port=7443, enrol_port=7444)
    with open_ledger(region) as ledger:
        ledger.add_ward(Ward("san-martino/radiology", "San Martino", "Radiology", "SM"))
    wrong = miss("reconcile", "--last", "--ward", "san-martino/surgery", "--state", region)
    assert wrong.returncode == 1 and "there are: san-martino/radiology" in wrong.stderr
    right = miss("reconcile", "--last", "--ward", "san-martino/radiology", "--state", region)
    assert right.returncode == 0 and "nothing was compared yet" in right.stderr


def test_a_pass_that_has_read_no_pack_yet_names_none(node: Path) -> None:
    (node / "scrub.json").write_text(json.dumps(asdict(ScrubNote(began_us=1))))
    told = miss("scrub", "--state", node)
    assert told.returncode == 0 and "in the first pack" in told.stdout and "pack 0" not in told.stdout
