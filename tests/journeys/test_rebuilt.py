"""The index is disposable: `miss rebuild` makes it anew from packs and facts, equal to what was lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from archive.archive import Archive, ArchiveSettings
from archive.index.index import Index
from miss import configuration
from tests.cluster import GALLIERA, Cluster, qido, value
from tests.commands import miss
from tests.datasets import make_instance, make_study


def dump(settings: ArchiveSettings) -> dict[str, list[tuple[Any, ...]]]:
    index = Index.open(settings.database_url, read_only=True)
    try:
        return index.dump()
    finally:
        index.close()


def test_a_lost_index_comes_back_equal(tmp_path: Path) -> None:
    study = make_study(5, series=2, patient_id="REBUILD")
    other = make_instance(sop_uid=study[0].sop_instance_uid, patient_id="SOMEBODY-ELSE")  # becomes a conflict
    with Cluster(tmp_path) as cluster:
        cluster.send([*study, other, study[1]])
        cluster.send(study[:2], GALLIERA)  # two wards hold the same instances
        cluster.settle()
        ward = cluster.ward()
        folders = {ward.state: configuration.node(ward.settings).archive_settings(),
                   cluster.region.folder: configuration.hub(cluster.region.hub_toml).archive_settings()}
        running = miss("rebuild", "--state", str(ward.state))
        assert running.returncode == 1 and "another process" in running.stderr
        cluster.region.stop()

        for folder, settings in folders.items():
            before = dump(settings)
            assert any(before.values())
            for path in settings.state.glob("index.db*"):
                path.unlink()
            done = miss("rebuild", "--state", str(folder))
            assert done.returncode == 0, done.stderr
            assert "0 damaged" in done.stdout
            assert dump(settings) == before
            with Archive.open(settings, outbox=folder != cluster.region.folder, read_only=True) as archive:
                assert archive.index.totals().conflicts == 1

        cluster.region.start()
        with cluster.browser() as browser:
            [found] = qido(browser, "/studies", PatientID="REBUILD")
            assert value(found, "00201208") == 5
        assert cluster.backlog().pending == 0  # receipts are facts: nothing is sent again
