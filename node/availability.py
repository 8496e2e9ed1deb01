"""Owns Instance Availability Notifications as SCU (PS3.4 Annex R): it tells a device which instances of a
study can be had, and by which AE title. When to tell whom, the routing rules say; it keeps no queue and never
retries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

from archive.model import StoredInstance
from node.destinations import Destinations
from node.dimse import messages
from node.dimse.association import Limits
from node.dimse.contexts import EXPLICIT_LITTLE, IMPLICIT_LITTLE, INSTANCE_AVAILABILITY, PERFORMED_STEP
from node.dimse.identifiers import write_identifier
from node.dimse.messages import Field
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Requestor
from node.dimse.status import CLASS_NOT_SUPPORTED

ONLINE, NEARLINE = "ONLINE", "NEARLINE"
_PROPOSED = ProposedContext(1, INSTANCE_AVAILABILITY, (EXPLICIT_LITTLE, IMPLICIT_LITTLE))


@dataclass(frozen=True, slots=True)
class Notice:
    """What is to be said of a study. `uid` names the notice: told again under the same, it is no other one.
    `steps` are the SOP Instance UIDs of the performed procedure steps that made it."""

    uid: str
    study_uid: str
    instances: Sequence[StoredInstance]
    steps: Sequence[str] = ()


class AvailabilityScu:
    """Tells devices what can be had here. Safe to use from any thread."""

    def __init__(self, destinations: Destinations, ae_title: str, limits: Limits | None = None) -> None:
        self._destinations = destinations
        self._ae_title = ae_title
        self._limits = limits

    def notify(self, to: str, notices: Sequence[Notice], tell: Callable[[Notice, int, str], None]) -> None:
        """N-CREATE each over one association; `tell` hears its status and comment, 0122 when the device takes
        no notices. Raises NotFound for an unknown device, AssociationEnded when the association can't be had
        or breaks: what was not told of was not sent."""
        peer = self._destinations.peer(to)
        with Requestor.connect(peer, self._ae_title, [_PROPOSED], limits=self._limits) as requestor:
            context = requestor.context_of(INSTANCE_AVAILABILITY)
            for notice in notices:
                if context is None:
                    tell(notice, CLASS_NOT_SUPPORTED, "it takes no availability notifications")
                    continue
                request = messages.normalized_request(
                    Field.N_CREATE, requestor.next_message_id(), INSTANCE_AVAILABILITY, notice.uid,
                    has_dataset=True,
                )  # fmt: skip
                dataset = write_identifier(self.dataset_of(notice), context.transfer_syntax)
                answer, _ = requestor.call(context, request, dataset)
                tell(notice, answer.status, answer.text(messages.ERROR_COMMENT))

    def dataset_of(self, notice: Notice) -> Dataset:
        """The notification's data set (PS3.4 Table R.3.2-1)."""
        dataset = Dataset()
        dataset.ReferencedPerformedProcedureStepSequence = Items(map(_step, notice.steps))
        dataset.StudyInstanceUID = notice.study_uid
        by_series: dict[str, list[StoredInstance]] = {}
        for one in notice.instances:
            by_series.setdefault(one.series_uid, []).append(one)
        dataset.ReferencedSeriesSequence = Items(
            self._series(uid, instances) for uid, instances in sorted(by_series.items())
        )
        return dataset

    def _series(self, uid: str, instances: Sequence[StoredInstance]) -> Dataset:
        series = Dataset()
        series.ReferencedSOPSequence = Items(map(self._instance, instances))
        series.SeriesInstanceUID = uid
        return series

    def _instance(self, one: StoredInstance) -> Dataset:
        item = Dataset()
        item.ReferencedSOPClassUID = one.head.sop_class_uid
        item.ReferencedSOPInstanceUID = one.head.sop_instance_uid
        item.InstanceAvailability = NEARLINE if one.evicted else ONLINE  # the region's come with a delay
        item.RetrieveAETitle = self._ae_title
        return item


def _step(uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = PERFORMED_STEP
    item.ReferencedSOPInstanceUID = uid
    item.PerformedWorkitemCodeSequence = Items([])  # Type 2: nobody here knows of work items
    return item
