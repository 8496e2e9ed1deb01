"""Every real file of the shared public set that can be stored: in, replicated, found at three levels, and
back byte for byte. An extra: it runs where the set lies beside the repository."""

from __future__ import annotations

import json
from collections import defaultdict
from hashlib import sha256
from pathlib import Path

import pytest

from archive.model import is_uid
from miss.files import DicomFile, find
from node.dimse import contexts
from node.dimse.requestor import Requestor
from tests.cluster import CALLING, GALLIERA, RADIOLOGY, Cluster, dataset_of, qido, retrieve, value

PUBLIC = Path(__file__).parents[3] / "shared" / "data" / "public"

pytestmark = pytest.mark.skipif(not (PUBLIC / "manifest.jsonl").exists(), reason="the public set is not here")


@pytest.mark.timeout(600)
def test_what_can_be_stored_comes_back(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (PUBLIC / "manifest.jsonl").read_text().splitlines()]
    # Two that the manifest calls storable have a SOP Instance UID that is none: nobody can name them.
    storable = {PUBLIC / row["file"] for row in rows if row["storable"] and is_uid(row["iuid"])}
    files = [file for file in find([PUBLIC]).files if file.path in storable]
    assert len(files) == len(storable) >= 582
    first: dict[str, tuple[DicomFile, bytes]] = {}
    others, refused = set[tuple[str, bytes]](), dict[str, int]()
    with Cluster(tmp_path, [RADIOLOGY, GALLIERA]) as cluster:
        for file, status in send_each(cluster, files):
            dataset = file.path.read_bytes()[file.dataset_offset:]
            if status != 0:
                refused[str(file.path.relative_to(PUBLIC))] = status
            elif file.sop_instance_uid not in first:
                first[file.sop_instance_uid] = (file, dataset)
            elif first[file.sop_instance_uid][1] != dataset:
                others.add((file.sop_instance_uid, sha256(dataset).digest()))
        # What the standard calls invalid is refused with its status: A900 and C000 (PS3.4 Table B.2-1).
        assert set(refused.values()) <= {0xA900, 0xC000}, refused
        print(f"{len(first)} stored, {len(others)} conflicts, refused: {refused}")
        cluster.settle(180)
        held = cluster.backlog()
        assert held.conflicts + held.equivalents == len(others)
        assert cluster.backlog().instances == len(first)
        with cluster.browser() as browser:
            by_series = defaultdict(set)
            for uid, (_, dataset) in first.items():
                [found] = qido(browser, "/instances", SOPInstanceUID=uid)
                study, series = value(found, "0020000D"), value(found, "0020000E")
                by_series[study, series].add(uid)
                [got] = retrieve(browser, f"/studies/{study}/series/{series}/instances/{uid}")
                assert dataset_of(got) == dataset, uid
            for (study, series), uids in by_series.items():
                [found] = qido(browser, f"/studies/{study}/series", SeriesInstanceUID=series)
                assert value(found, "00201209") == len(uids)
            for study in {study for study, _ in by_series}:
                [found] = qido(browser, "/studies", StudyInstanceUID=study)
                count = sum(len(uids) for (of, _), uids in by_series.items() if of == study)
                assert value(found, "00201208") == count


def send_each(cluster: Cluster, files: list[DicomFile]) -> list[tuple[DicomFile, int]]:
    """One association for each set of contexts; every file with the status that it got."""
    answered = []
    for proposed in contexts.plan((file.sop_class_uid, file.transfer_syntax_uid) for file in files):
        with Requestor.connect(cluster.peer(), CALLING, proposed) as requestor:
            for file in files:
                context = requestor.context(file.sop_class_uid, file.transfer_syntax_uid)
                if context is None:
                    continue
                dataset = file.path.read_bytes()[file.dataset_offset:]
                answered.append((file, requestor.store(context, file.sop_instance_uid, [dataset])))
    assert len(answered) == len(files), "a SOP class or transfer syntax was not accepted"
    return answered
