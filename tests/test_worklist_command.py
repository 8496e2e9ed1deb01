"""`miss worklist` as people type it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from archive.archive import Archive
from archive.errors import InvalidInput
from archive.ledger import Ledger, PerformedStep
from archive.settings import load
from miss import worklist
from node.dimse.contexts import IMPLICIT_LITTLE
from node.dimse.identifiers import write_identifier
from node.settings import NodeSettings
from tests.commands import miss
from tests.federation.regions import make_region
from tests.node.worklists import worklist_item


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """An enrolled node's folder."""
    region = make_region(tmp_path / "region")
    identity = region.node(region.add_ward("San Martino", "Radiology", "SANMARTINO"), "127.0.0.1:1")
    region.ledger.close()
    folder = tmp_path / "node"
    folder.mkdir()
    (folder / "node.toml").write_text(
        f'state = "{folder}"\nidentity = "{identity.folder}"\n[dimse]\nport = 1\nhost = "127.0.0.1"\n'
    )
    settings = load(NodeSettings, folder / "node.toml")
    Archive.open(settings.archive_settings(), outbox=True).close()
    return folder


def test_steps_are_added_listed_shown_imported_and_removed(node: Path, tmp_path: Path) -> None:
    added = miss("worklist", "add", "--patient-name", "Rossi^Maria", "--patient-id", "P1", "--modality", "CT",
                 "--station", "CT1", "--station", "CT2", "--date", "20261122", "--time", "0930",
                 "--weight", "70.5", "--state", node)
    assert added.returncode == 0, added.stderr
    key, study_uid = added.stdout.split()
    assert study_uid.startswith("2.25.")
    listed = miss("worklist", "ls", "--date", "20261122", "--station", "CT2", "--state", node)
    assert key[:8] in listed.stdout and "Rossi^Maria" in listed.stdout and "SCHEDULED" in listed.stdout
    assert key[:8] not in miss("worklist", "ls", "--date", "20261123", "--state", node).stdout
    shown = miss("worklist", "show", key[:8], "--json", "--state", node)
    attributes = json.loads(shown.stdout)
    assert attributes["0020000D"]["Value"] == [study_uid]
    assert attributes["00080050"]["Value"][0].startswith("A")
    assert "Rossi^Maria" in miss("worklist", "show", key, "--state", node).stdout

    file, broken = tmp_path / "a.wl", tmp_path / "b.wl"
    file.write_bytes(write_identifier(worklist_item(7), IMPLICIT_LITTLE))
    broken.write_bytes(file.read_bytes()[:-20])
    imported = miss("worklist", "import", file, broken, tmp_path / "none.wl", "--state", node)
    assert imported.returncode == 1 and "1 steps" in imported.stderr
    assert "2 of 3 files were not taken" in imported.stderr and "Rossi" not in imported.stderr
    removed = miss("worklist", "rm", key[:8], "--state", node)
    assert removed.returncode == 0, removed.stderr
    again = miss("worklist", "rm", key[:8], "--state", node)
    assert again.returncode == 1 and "there is no such step" in again.stderr
    status = json.loads(miss("node", "status", "--json", "--state", node).stdout)
    assert (status["scheduled_steps"], status["steps_in_progress"]) == (1, 0)


@pytest.mark.parametrize(("option", "value", "why"), [
    ("date", "tomorrow", "YYYYMMDD"), ("date", "2026-11-22", "YYYYMMDD"), ("date", "2026111", "YYYYMMDD"),
    ("time", "9", "HHMM"), ("time", "99", "HHMM"), ("study_uid", "1.", "UID"),
    ("birth_date", "1970", "YYYYMMDD"), ("weight", "heavy", "a number"), ("sex", "Q", "M, F, O"),
    ("priority", "SOON", "STAT"), ("accession", "A" * 17, "up to 16"),
    ("description", "CT\\head", "one value"), ("physician", "Rossi\n", "one value"),
    ("patient_name", "", "no value"), ("patient_id", " ", "no value"), ("modality", "ct", "capital letters"),
    ("station", ["S" * 17], "1 to 16 characters")])
def test_what_a_modality_could_not_read_is_refused(node: Path, option: str, value: Any, why: str) -> None:
    given: dict[str, Any] = {"patient_name": "A", "patient_id": "1", "modality": "CT", option: value}
    with pytest.raises(InvalidInput, match=why):
        worklist.add(**given, state=node)


def test_a_day_that_is_none_is_no_empty_list(node: Path) -> None:
    refused = miss("worklist", "ls", "--date", "2026-11-22", "--state", node)
    assert refused.returncode == 1 and "--date is a day, written YYYYMMDD" in refused.stderr


def test_performed_steps_are_listed_and_shown(node: Path) -> None:
    ledger = Ledger.open(load(NodeSettings, node / "node.toml").ledger_url)
    dataset = '{"00100020":{"vr":"LO","Value":["P1"]}}'
    step = PerformedStep("1.2.3", "IN PROGRESS", "CT1", "PPS1", "CT1", "CT", "P1", "20261122", "10", dataset)
    ledger.create_performed(step)
    ledger.close()
    assert "IN PROGRESS" in miss("worklist", "performed", "--in-progress", "--state", node).stdout
    shown = miss("worklist", "performed", "1.2.3", "--json", "--state", node)
    assert json.loads(shown.stdout)["00100020"]["Value"] == ["P1"]
    assert miss("worklist", "performed", "1.2.4", "--state", node).returncode == 1
    status = miss("node", "status", "--state", node)
    assert "1 performed steps in progress" in status.stdout.replace("\n", " ")
