"""A ward's own portal opens what its node gave up: the node is asked through the ledger, readers wait for it,
and hear why not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from archive.archive import Archive
from archive.errors import Evicted, Unavailable
from archive.ledger import Ledger
from archive.model import Fact, FactKind, Ward
from archive.orders import OrderDesk
from archive.space.eviction import EvictionRequest
from federation import bringing_orders
from federation.bringing_orders import BRING, NOT_RUNNING, NodeReader
from federation.node_source import NodeSource
from federation.policy import Principal, Role
from tests.datasets import PROVENANCE, Instance, make_study
from tests.federation.wards import open_archive

WARD = Ward(PROVENANCE.ward, "San Martino", "Radiology", "SM")
TECHNICIAN = Principal("tina", Role.TECHNICIAN, WARD.id)


class Trial:
    """A node's archive with one study that was given up, and its portal over it."""

    def __init__(self, archive: Archive, ledger: Ledger) -> None:
        self.archive = archive
        self.ledger = ledger
        self.study = make_study(3)
        self.uid = self.study[0].study_uid
        self.store()
        archive.wait_indexed()
        archive.record_facts(
            [Fact(FactKind.RECEIPT, one.sop_instance_uid, one.digest, "", 1) for one in self.study])
        archive.upkeep.evict(EvictionRequest(1, study_uid=self.uid)).result(20)
        self.source = NodeSource(archive, WARD, reader=NodeReader(archive, ledger))
        self.orders = 0

    def store(self) -> None:
        for one in self.study:
            reception = self.archive.intake.begin(one.head())
            reception.write(one.dataset)
            reception.commit().wait_durable()

    def bring(self, detail: Mapping[str, str], by: str) -> str:
        """As a node does that has a line."""
        self.orders += 1
        threading.Thread(target=self.store).start()
        return "it is being brought back"

    def away(self, detail: Mapping[str, str], by: str) -> str:
        raise Unavailable("the region can't be reached now")

    @contextmanager
    def node(self, handler: object) -> Iterator[None]:
        desk = OrderDesk(self.ledger, {BRING: handler})  # type: ignore[dict-item]
        desk.start()
        try:
            yield
        finally:
            desk.stop()

    def read(self, uid: str | None = None) -> list[bytes]:
        found = self.source.instances(TECHNICIAN, self.uid, None, uid)
        payloads = []
        for one in found:
            with self.source.open_payload(one) as payload:
                payloads.append(payload.read()[one.location.dataset_offset:])
        return payloads


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Trial]:
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    with open_archive(tmp_path / "state") as archive:
        yield Trial(archive, ledger)
    ledger.close()


def sent(instances: list[Instance]) -> list[bytes]:
    return sorted(one.dataset for one in instances)


def test_what_is_opened_is_brought_back_by_one_order(trial: Trial) -> None:
    assert trial.source.at_hand(TECHNICIAN, trial.uid) is None  # it has to be waited for
    with trial.node(trial.bring):
        readers = [threading.Thread(target=trial.read) for _ in range(4)]
        for reader in readers:
            reader.start()
        assert sorted(trial.read()) == sent(trial.study)
        for reader in readers:
            reader.join(20)
    assert trial.orders == 1
    assert trial.source.at_hand(TECHNICIAN, trial.uid) is not None


def test_a_reader_hears_why_it_can_t_be_had_and_may_try_again(trial: Trial) -> None:
    with trial.node(trial.away):
        for _ in range(2):
            with pytest.raises(Evicted, match="the region can't be reached now"):
                trial.read()
    with trial.node(trial.bring):
        assert sorted(trial.read()) == sent(trial.study)


def test_a_node_that_does_not_run_is_not_waited_for_long(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bringing_orders, "ANSWER_S", 0.2)
    begun_s = time.monotonic()
    with pytest.raises(Evicted, match=NOT_RUNNING):
        trial.read(trial.study[0].sop_instance_uid)
    assert time.monotonic() - begun_s < 10


def test_what_is_read_at_the_portal_counts_as_wanted(trial: Trial) -> None:
    trial.source.at_hand(TECHNICIAN, trial.uid)
    trial.source._reader._uses.flush()  # type: ignore[union-attr]
    assert set(trial.ledger.uses_of([trial.uid])) == {trial.uid}
