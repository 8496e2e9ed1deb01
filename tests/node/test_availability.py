"""Instance Availability Notification (PS3.4 Annex R), to an SCP of pynetdicom's: by rule, when a study is
complete, over the same queue as everything else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import InstanceAvailabilityNotification, Verification  # type: ignore[attr-defined]

from archive.ledger import Destination, RouteKind
from node.dimse.contexts import PERFORMED_STEP
from tests.datasets import make_instance
from tests.node.receiving import receiver
from tests.node.routed import device, routing
from tests.node.storing import Storing, storing
from tests.waiting import wait_for

RULES = """
[[rule]]
name = "tell the RIS"
when = "study complete"
notify = "RIS"
to = "PACS"
[rule.match]
Modality = "CT"
[rule.not]
Modality = "PR"
"""


@dataclass
class Ris:
    """An SCP of the notification, which keeps what it was told."""

    port: int = 0
    told: list[tuple[str, Dataset]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def ris(answer: Callable[[], int] = lambda: 0, *, syntax: str = ExplicitVRLittleEndian,
        takes: bool = True) -> Iterator[Ris]:
    running = Ris()

    def create(event: Any) -> tuple[int, Dataset | None]:
        with running.lock:
            running.told.append((str(event.request.AffectedSOPInstanceUID), event.attribute_list))
        return answer(), None

    ae = AE("RIS")
    ae.add_supported_context(InstanceAvailabilityNotification if takes else Verification, syntax)
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_N_CREATE, create)])
    assert server is not None and server.socket is not None
    running.port = server.socket.getsockname()[1]
    try:
        yield running
    finally:
        server.shutdown()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Storing]:
    with storing(tmp_path) as running:
        yield running


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_complete_study_is_told_of_and_sent(served: Storing, syntax: str) -> None:
    first = make_instance()
    second = make_instance(study_uid=first.study_uid, modality="SR", number=2)
    other = make_instance(modality="MR")
    with ris(syntax=syntax) as told, receiver() as pacs:
        device(served, "RIS", told.port)
        device(served, "PACS", pacs.port)
        with routing(served, RULES) as running:
            served.send(first, second, other)
            served.archive.wait_indexed()
            assert not running.queue()  # nothing goes before the study is complete
            at_us = served.archive.index.described([first.sop_instance_uid])[0].stored.head.provenance
            for one in (first, other):
                running.routing.study_done(one.study_uid, "quiet", at_us.received_at_us + 10**6)
            wait_for(lambda: len(told.told) == 1 and len(pacs.received) == 2 and not running.queue(),
                     "the notice and the study")
    (_, dataset), = told.told
    assert set(pacs.received) == {first.sop_instance_uid, second.sop_instance_uid}
    assert dataset.StudyInstanceUID == first.study_uid
    assert len(dataset.ReferencedPerformedProcedureStepSequence) == 0
    by_series = {series.SeriesInstanceUID: series for series in dataset.ReferencedSeriesSequence}
    assert set(by_series) == {first.series_uid, second.series_uid}
    item, = by_series[first.series_uid].ReferencedSOPSequence
    assert (item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID) == (
        first.sop_class_uid, first.sop_instance_uid)
    assert (item.InstanceAvailability, item.RetrieveAETitle) == ("ONLINE", "MISS")


def test_what_a_rule_excludes_in_any_instance_is_not_told_of(served: Storing) -> None:
    first = make_instance()
    excluded = make_instance(study_uid=first.study_uid, modality="PR", number=2)
    last = make_instance()
    with ris() as told:
        device(served, "RIS", told.port)
        with routing(served, RULES.replace('to = "PACS"\n', "")) as running:
            served.send(first, excluded, last)
            for one in (first, last):
                running.routing.study_done(one.study_uid, "quiet", 2**60)
            wait_for(lambda: told.told and not running.queue(), "the last study's notice")
    assert [dataset.StudyInstanceUID for _, dataset in told.told] == [last.study_uid]


def test_the_same_notice_has_the_same_uid_and_a_grown_study_another(served: Storing) -> None:
    """The first try is answered by a failure: the second is of the same instance."""
    answers = [0x0110]
    one = make_instance()
    with ris(lambda: answers.pop() if answers else 0) as told:
        device(served, "RIS", told.port)
        with routing(served, RULES.replace('to = "PACS"\n', "")) as running:
            served.send(one)
            running.routing.study_done(one.study_uid, "quiet", 2**60)
            wait_for(lambda: len(told.told) == 2 and not running.queue(), "the second try")
            running.routing.study_done(one.study_uid, "quiet", 2**60)
            wait_for(lambda: not served.ledger.has_complete_studies(), "the same study again")
            assert not running.queue()
            served.send(make_instance(study_uid=one.study_uid, number=2))
            running.routing.study_done(one.study_uid, "quiet", 2**60)
            wait_for(lambda: len(told.told) == 3 and not running.queue(), "the grown study's")
    first, second, third = (uid for uid, _ in told.told)
    assert first == second != third
    assert first.startswith("2.25.")
    instances = [len(series.ReferencedSOPSequence)
                 for _, dataset in told.told for series in dataset.ReferencedSeriesSequence]
    assert sum(instances) == 1 + 1 + 2


def test_one_that_takes_no_notices_is_set_aside_with_the_reason(served: Storing) -> None:
    one = make_instance()
    with ris(takes=False) as told:
        device(served, "RIS", told.port)
        with routing(served, RULES.replace('to = "PACS"\n', "")) as running:
            served.send(one)
            running.routing.study_done(one.study_uid, "quiet", 2**60)
            wait_for(lambda: running.queue() and running.queue()[0].status, "an answer")
    row, = served.ledger.routes(10)
    assert (row.state, row.status, row.to) == ("set aside", 0x0122, Destination(RouteKind.NOTICE, "RIS"))
    assert "takes no availability notifications" in row.comment


def test_the_performed_steps_are_named(served: Storing) -> None:
    from node.availability import AvailabilityScu, Notice
    from node.destinations import Destinations
    from node.settings import TlsSettings

    one = make_instance()
    served.send(one)
    notice = Notice("1.2.3", one.study_uid, served.stored(one), ("1.2.3.4",))
    scu = AvailabilityScu(Destinations(served.ledger, TlsSettings()), "MISS")
    statuses = []
    with ris() as told:
        device(served, "RIS", told.port)
        scu.notify("RIS", [notice], lambda _, status, comment: statuses.append(status))
    assert statuses == [0]
    (uid, dataset), = told.told
    step, = dataset.ReferencedPerformedProcedureStepSequence
    assert (uid, step.ReferencedSOPClassUID, step.ReferencedSOPInstanceUID) == (
        "1.2.3", PERFORMED_STEP, "1.2.3.4")
