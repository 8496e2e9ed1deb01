"""`miss remove` as people type it, on a node's folder and beside the process that writes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from archive.archive import Archive
from archive.handlers import handlers_of
from archive.ledger import Ledger
from archive.model import Level, Query
from archive.orders import OrderDesk
from miss import configuration
from tests.archive.archives import store
from tests.commands import miss
from tests.datasets import make_instance


def remove(*arguments: object) -> subprocess.CompletedProcess[str]:
    return miss("remove", *arguments)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "node"
    folder.mkdir()
    (folder / "node.toml").write_text(
        'state = "."\n[archive]\nfree_bytes_min = 0\n[retention]\nyears = 10.0\nby_modality = ["CT=0"]\n'
    )
    Ledger.open(configuration.node(folder / "node.toml").ledger_url).close()
    with opened(folder) as archive:
        for number in range(4):
            one = make_instance(study_uid=f"1.2.{number % 2}", series_uid=f"1.2.{number % 2}.1",
                                sop_uid=f"1.2.3.{number}", number=number)  # fmt: skip
            store(archive, one)
        archive.wait_indexed()
    return folder


def opened(state: Path) -> Archive:
    return Archive.open(configuration.node(state / "node.toml").archive_settings(), outbox=True)


@pytest.fixture
def running(state: Path) -> Iterator[Archive]:
    """What a node does with orders, in this process."""
    ledger = Ledger.open(configuration.node(state / "node.toml").ledger_url)
    with opened(state) as archive:
        desk = OrderDesk(ledger, handlers_of(archive))
        desk.start()
        yield archive
        desk.stop()
    ledger.close()


def listed(state: Path, *options: str) -> list[dict[str, Any]]:
    done = remove("ls", "--json", *options, "--state", state)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_removed_undone_removed_and_purged_where_nothing_runs(state: Path) -> None:
    assert "nothing is removed" in remove("ls", "--state", state).stderr
    done = remove("study", "1.2.0", "--reason", "sent twice", "--state", state)
    assert done.returncode == 0 and "2 instances are no longer shown" in done.stderr, done.stderr
    (row,) = listed(state)
    assert (row["level"], row["uid"], row["reason"], row["instances"]) == ("STUDY", "1.2.0", "sent twice", 2)
    assert remove("undo", row["id"][:12], "--state", state).returncode == 0
    assert listed(state) == [] and len(listed(state, "--all")) == 1
    done = remove("instance", "1.2.3.1", "--reason", "blurred", "--code", "113001", "--state", state)
    assert done.returncode == 0, done.stderr
    (row,) = listed(state)
    done = remove("purge", row["id"], "--state", state)
    assert "1 instances would be purged" in done.stdout
    done = remove("purge", row["id"], "--yes", "--state", state)
    assert done.returncode == 0 and "1 contents" in done.stderr, done.stderr
    (row,) = listed(state)
    assert row["purged"] and row["with_bytes"] == 0
    assert "is purged" in remove("undo", row["id"], "--state", state).stderr
    with opened(state) as archive:
        assert archive.count(Query(Level.IMAGE)) == 3


def test_a_process_that_runs_does_it_and_its_audit_log_says_who(running: Archive, state: Path) -> None:
    done = remove("series", "1.2.1.1", "--reason", "phantom", "--state", state)
    assert done.returncode == 0, done.stderr
    assert running.count(Query(Level.STUDY)) == 1
    wrong = remove("study", "1.2.0", "--reason", "", "--state", state)
    assert wrong.returncode != 0 and "say why" in wrong.stderr
    ledger = Ledger.open(configuration.node(state / "node.toml").ledger_url)
    assert any("remove" in str(row) for row in ledger.audit_rows())
    ledger.close()


def test_inside_retention_it_is_refused_and_a_rejection_hides(state: Path) -> None:
    toml = state / "node.toml"
    toml.write_text(toml.read_text().replace('by_modality = ["CT=0"]', 'by_modality = ["CT=20"]'))
    done = remove("study", "1.2.0", "--reason", "sent twice", "--state", state)
    assert done.returncode != 0 and "inside retention" in done.stderr
    assert remove("study", "1.2.0", "--reason", "no", "--code", "113037", "--state", state).returncode == 0
    (row,) = listed(state)
    done = remove("purge", row["id"], "--yes", "--state", state)
    assert done.returncode != 0 and "inside retention" in done.stderr
