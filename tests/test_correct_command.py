"""`miss correct` as people type it, on a node's folder where nothing runs."""

from __future__ import annotations

from pathlib import Path

from archive.archive import Archive
from archive.ledger import Ledger
from miss import configuration
from tests.archive.archives import store
from tests.commands import miss
from tests.datasets import make_instance


def test_what_was_corrected_is_listed_in_one_line(tmp_path: Path) -> None:
    toml = tmp_path / "node.toml"
    toml.write_text('state = "."\n[archive]\nfree_bytes_min = 0\n')
    Ledger.open(configuration.node(toml).ledger_url).close()
    with Archive.open(configuration.node(toml).archive_settings(), outbox=True) as archive:
        store(archive, make_instance(study_uid="1.2.0", series_uid="1.2.0.1", sop_uid="1.2.3.0"))
        archive.wait_indexed()
    wrong = miss("correct", "study", "1.2.0", "--set", "PatientID", "--reason", "x", "--state", tmp_path)
    assert wrong.returncode == 1 and "KEYWORD=VALUE" in wrong.stderr
    done = miss("correct", "study", "1.2.0", "--set", "PatientID=4711", "--set", "PatientName=Rossi^Maria",
                "--reason", "wrong worklist entry", "--state", tmp_path)  # fmt: skip
    assert done.returncode == 0 and "PatientID, PatientName corrected" in done.stderr, done.stderr
    listed = miss("correct", "ls", "--state", tmp_path)
    assert "PatientID=4711; PatientName=Rossi^Maria" in listed.stdout
