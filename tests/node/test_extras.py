"""Real files and hostile files over C-STORE, where they are at hand: a folder `shared` beside the
repository."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest

from archive.dataset import part10
from archive.dataset.part10 import Part10Head
from archive.errors import CannotUnderstand, InvalidInstance
from archive.model import is_uid
from node.dimse.association import Limits
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Requestor, echo
from node.dimse.sending import Part10File, read_meta, send_files
from tests.node.storing import storing

DATA = Path(__file__).parents[3] / "shared" / "data"
PATIENT = Limits(message_timeout_s=30.0)
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"


@pytest.mark.skipif(not (DATA / "public/manifest.jsonl").exists(), reason="no real files here")
def test_every_storable_file_is_stored_byte_for_byte(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (DATA / "public/manifest.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["storable"] and all(map(is_uid, (row["iuid"], row["st"], row["se"])))]
    wanted: dict[str, list[Path]] = defaultdict(list)
    for row in rows:
        wanted[row["iuid"]].append(DATA / "public" / row["file"])
    with storing(tmp_path, private=True, limits=PATIENT) as served:
        report = send_files(served.peer, "CT1", [path for paths in wanted.values() for path in paths])
        served.archive.wait_indexed()
        studies = {(row["st"], row["iuid"]) for row in rows}
        assert report.sent >= len(wanted)
        assert {status for _, status in report.failed} <= {0xC000, 0xA900}
        for study_uid, uid in studies:
            copies = served.archive.instances(study_uid, sop_instance_uid=uid)
            if not copies:  # the same UID under another study came first: a conflict
                assert len(wanted[uid]) > 1
                continue
            sent = {path.read_bytes()[read_meta(path).dataset_offset:] for path in wanted[uid]}
            assert served.dataset(copies[0]) in sent
        assert served.totals().instances == len(wanted)


def _head(path: Path) -> Part10Head | Part10File:
    """What a sender that looks at nothing would say of a file whose UIDs are none."""
    try:
        return read_meta(path)
    except InvalidInstance:
        with path.open("rb") as file:
            return part10.read_meta(file)


@pytest.mark.skipif(not (DATA / "hostile/manifest.json").exists(), reason="no hostile files here")
def test_hostile_files_cost_bounded_time_and_memory(tmp_path: Path) -> None:
    rows = json.loads((DATA / "hostile/manifest.json").read_text())
    stored = 0
    with storing(tmp_path, private=True, limits=PATIENT) as served:
        echo(served.peer, "CT1")
        before = psutil.Process().memory_info().rss
        for row in rows:
            path = DATA / "hostile" / row["file"]
            try:
                meta = _head(path)
                sop_class, uid, syntax = meta.sop_class_uid, meta.sop_instance_uid, meta.transfer_syntax_uid
                dataset = path.read_bytes()[meta.dataset_offset:]
            except (CannotUnderstand, ValueError):
                sop_class, uid, syntax = "1.2.840.10008.5.1.4.1.1.7", "1.2.3.4", EXPLICIT_LITTLE
                dataset = path.read_bytes()
            proposed = [ProposedContext(1, sop_class, (syntax,))]
            with Requestor.connect(served.peer, "CT1", proposed, limits=PATIENT) as requestor:
                context = requestor.context_of(sop_class)
                if context is None:
                    continue
                started = time.monotonic()
                status = requestor.store(context, uid, [dataset])
                assert time.monotonic() - started < 3, row["file"]
                assert status in (0x0000, 0x0117, 0xA700, 0xA900, 0xC000), (row["file"], f"{status:04X}")
                stored += status == 0
                if row["expect"].startswith("stored,"):
                    assert status == 0, row["file"]
        assert echo(served.peer, "CT1") == 0
        assert stored > 20
        assert psutil.Process().memory_info().rss - before < 256 << 20
        assert {entry.name.partition("-")[0] for entry in tmp_path.iterdir()} == {"state", "ledger.db"}
