"""Rows of instances and conflicts back as domain objects. It reads rows that others fetched."""

from __future__ import annotations

from typing import Any

from archive.index.rows import fields_of
from archive.model import (
    ConflictRow,
    ConflictState,
    InstanceHead,
    Level,
    Location,
    Provenance,
    StoredInstance,
)


def head_of(row: Any) -> InstanceHead:
    source = Provenance(row.ward, row.issuer, row.device, row.calling_ae, row.received_at_us)
    return InstanceHead(row.sop_class_uid, row.sop_instance_uid, row.transfer_syntax_uid, source)


def location_of(row: Any) -> Location:
    return Location(row.pack, row.payload_offset, row.payload_length, row.dataset_offset)


def instance_of(row: Any) -> StoredInstance:
    return StoredInstance(
        study_uid=row.study_instance_uid,
        series_uid=row.series_instance_uid,
        head=head_of(row),
        digest=bytes(row.digest),
        location=location_of(row),
        instance=fields_of(Level.IMAGE, row._mapping),
        evicted=bool(row.evicted),
        damaged=bool(row.damaged),
    )


def conflict_of(row: Any) -> ConflictRow:
    """A row of a conflict beside the live content, whose columns are labelled `live_...`."""
    return ConflictRow(
        sop_instance_uid=row.sop_instance_uid,
        study_uid=row.study_instance_uid,
        series_uid=row.series_instance_uid,
        kept_digest=bytes(row.live_digest or b""),
        kept_study_uid=row.live_study or "",
        kept_series_uid=row.live_series or "",
        other_digest=bytes(row.digest),
        head=head_of(row),
        location=location_of(row),
        state=ConflictState(row.state),
        decided_by=row.decided_by,
        decided_us=row.decided_us,
        receipt_us=row.receipt_us,
    )
