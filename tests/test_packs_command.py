"""`miss packs` as people type it: on a node's folder, beside the process that writes, and on a disk of which
nothing else is left."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from archive.archive import Archive
from archive.errors import InvalidInput
from archive.handlers import handlers_of
from archive.ledger import Ledger
from archive.model import Fact, FactKind
from archive.orders import OrderDesk
from archive.rereading import read_attributes
from archive.space.orders import EVICT
from federation.reconcile_notes import Notes
from miss import configuration
from miss.packs import bytes_of, time_us
from tests.archive.archives import store
from tests.commands import miss
from tests.datasets import Instance, make_instance


def packs(*arguments: str) -> subprocess.CompletedProcess[str]:
    return miss("packs", *arguments)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "node"
    folder.mkdir()
    (folder / "node.toml").write_text('state = "."\n[archive]\nfree_bytes_min = 0\ndrop_delay_s = 0.0\n')
    Ledger.open(configuration.node(folder / "node.toml").ledger_url).close()
    return folder


@pytest.fixture
def made(state: Path) -> list[Instance]:
    instances = [make_instance(study_uid=f"1.2.{n % 2}", sop_uid=f"1.2.3.{n}", padding=40_000, number=n)
                 for n in range(6)]
    with opened(state) as archive:
        for instance in instances:
            store(archive, instance)
        archive.wait_indexed()
        archive.record_facts([Fact(FactKind.RECEIPT, i.sop_instance_uid, i.digest, "", 5) for i in instances])
    return instances


def opened(state: Path) -> Archive:
    return Archive.open(configuration.node(state / "node.toml").archive_settings(), outbox=True)


@pytest.fixture
def running(state: Path, made: list[Instance]) -> Iterator[Archive]:
    """What a node does with orders, in this process."""
    ledger = Ledger.open(configuration.node(state / "node.toml").ledger_url)
    with opened(state) as archive:
        desk = OrderDesk(ledger, handlers_of(archive))
        desk.start()
        yield archive
        desk.stop()
    ledger.close()


def test_packs_are_listed_verified_and_read_out(state: Path, made: list[Instance], tmp_path: Path) -> None:
    listed = json.loads(packs("ls", "--json", "--state", str(state)).stdout)
    assert [each["live"] for each in listed["packs"]] == [6] and listed["missing"] == []
    table = packs("ls", "1", "--state", str(state)).stdout
    assert all(instance.sop_instance_uid in table for instance in made)
    whole = packs("verify", "--state", str(state))
    assert whole.returncode == 0 and "6 live, 0 damaged" in whole.stderr
    done = packs("extract", "--study", "1.2.1", "--to", str(tmp_path / "out"), "--state", str(state))
    assert done.returncode == 0 and len(list((tmp_path / "out").iterdir())) == 3
    summary = packs("ls", "--state", str(state)).stdout
    assert "6 live" in summary and max(map(len, summary.splitlines())) <= 80
    to = ["--to", str(tmp_path / "x")]
    for wrong in (["extract", *to], ["ls", "77"], ["extract", "--uid", "../x", *to],
                  ["extract", "--study", "1.2.99", *to], ["extract", "--pack", "set-aside/x", *to]):
        refused = packs(*wrong, "--state", str(state))
        assert refused.returncode == 1 and refused.stderr.startswith("miss: ")


def test_damage_is_told_with_its_place_and_ends_with_one(state: Path, made: list[Instance]) -> None:
    pack = state / "packs" / "00000001.pack"
    data = bytearray(pack.read_bytes())
    place = data.index(made[2].dataset) + 20_000
    data[place] ^= 1
    pack.write_bytes(data)
    found = packs("verify", "1", "--json", "--state", str(state))
    assert found.returncode == 1
    (damage,) = json.loads(found.stdout)["damages"]
    assert damage["sop_instance_uid"] == made[2].sop_instance_uid
    assert damage["offset"] <= place < damage["end"]


def test_a_disk_of_a_machine_that_is_gone(state: Path, made: list[Instance], tmp_path: Path) -> None:
    rescued = tmp_path / "rescued"
    shutil.copytree(state / "packs", rescued / "packs")
    assert json.loads(packs("ls", "--json", "--state", str(rescued)).stdout)["packs"][0]["live"] == 6
    done = packs("extract", "--all", "--to", str(tmp_path / "out"), "--state", str(rescued))
    assert done.returncode == 0 and len(list((tmp_path / "out").iterdir())) == 6
    (rescued / "node.toml").write_text(f'state = "{state}"\n')
    assert f"name {state}" in packs("ls", "--state", str(rescued)).stderr
    nothing = packs("ls", "--state", str(tmp_path))
    assert nothing.returncode == 1 and "holds no packs" in nothing.stderr


def test_nothing_is_evicted_while_the_region_may_lack_what_it_confirmed(
    state: Path, made: list[Instance]
) -> None:
    notes = Notes(configuration.node(state / "node.toml").archive_settings().state)
    notes.change(held=True)
    asked = ("evict", "--study", "1.2.0", "--protected-to", "now", "--state", str(state))
    refused = packs(*asked)
    assert refused.returncode == 1 and "until the node has been compared" in refused.stderr
    with opened(state) as archive:
        assert not any(each.evicted for each in archive.instances("1.2.0"))
        order = handlers_of(archive, held=lambda: True)[EVICT]
        with pytest.raises(InvalidInput, match="compared"):
            order({"study": "1.2.0", "protected_to_us": "10"}, "anna")
    notes.change(held=False)
    assert "3 instances" in packs(*asked).stdout


def test_evictions_are_asked_of_the_process_that_runs(state: Path, running: Archive) -> None:
    tried = packs("evict", "--study", "1.2.0", "--protected-to", "now", "--dry-run", "--state", str(state))
    assert tried.returncode == 0 and "3 instances" in tried.stdout and "would be" in tried.stdout
    assert not any(each.evicted for each in running.instances("1.2.0"))
    early = packs("evict", "--study", "1.2.0", "--protected-to", "1970-01-01T00:00:00+00:00",
                  "--state", str(state))
    assert early.returncode == 1
    done = packs("evict", "--study", "1.2.0", "--protected-to", "now", "--state", str(state))
    assert done.returncode == 0 and "3 instances" in done.stdout, done.stderr
    assert all(each.evicted for each in running.instances("1.2.0"))
    region = state.parent / "region"
    shutil.copytree(state, region)
    (region / "node.toml").rename(region / "hub.toml")
    refused = packs("evict", "--study", "1.2.1", "--protected-to", "now", "--state", str(region))
    assert refused.returncode == 2 and "the folder of the node" in refused.stderr
    both = packs("evict", "--study", "1.2.1", "--older-than", "1d", "--protected-to", "now",
                 "--state", str(state))
    assert both.returncode == 1 and "one of" in both.stderr
    compacted = packs("compact", "--state", str(state))
    assert compacted.returncode == 0
    listed = json.loads(packs("ls", "--json", "--state", str(state)).stdout)
    assert sum(each["live"] for each in listed["packs"]) == 3
    assert packs("verify", "--state", str(state)).returncode == 0


def test_without_a_process_the_command_does_it_itself(state: Path, made: list[Instance],
                                                      caplog: pytest.LogCaptureFixture) -> None:
    done = packs("evict", "--older-than", "1s", "--protected-to", "now", "--state", str(state))
    assert done.returncode == 0, done.stderr  # the only pack is open: nothing is old enough to be sealed
    done = packs("evict", "--study", "1.2.0", "--protected-to", "now", "--state", str(state))
    assert "3 instances" in done.stdout, done.stderr
    with opened(state) as archive:
        live = archive.index.live(made[0].sop_instance_uid)
        assert live is not None
        evicted: Any = SimpleNamespace(sequence=1, head=live.head, location=live.location)
        assert read_attributes(archive.packs, evicted) is None
    assert not [record for record in caplog.records if record.name == "archive.rereading"]  # no damage
    done = packs("evict", "--older-than", "1s", "--protected-to", "now", "--state", str(state))
    assert "3 instances" in done.stdout, done.stderr
    with opened(state) as archive:
        assert archive.index.totals().instances == 6
        assert all(each.evicted for study in ("1.2.0", "1.2.1") for each in archive.instances(study))
        assert "packs/00000001.pack" not in archive.packs.storage.list("packs")


@pytest.mark.parametrize(("text", "count"), [("100G", 10**11), ("1.5m", 1_500_000), ("7", 7)])
def test_sizes_as_people_write_them(text: str, count: int) -> None:
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["", "G", "-1G", "nan", "1e400", "10GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        bytes_of(text)


def test_times_as_people_write_them() -> None:
    assert time_us("1970-01-02T00:00:00+00:00") == 86_400_000_000
    with pytest.raises(InvalidInput):
        time_us("yesterday")
