"""Rows of instances and conflicts back as domain objects. It reads rows that others fetched."""

from __future__ import annotations

from typing import Any

from archive.index.rows import fields_of
from archive.model import ConflictRow, InstanceHead, Level, Location, Provenance, StoredInstance


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
    )


def conflict_of(row: Any, kept_digest: bytes) -> ConflictRow:
    return ConflictRow(
        sop_instance_uid=row.sop_instance_uid,
        study_uid=row.study_instance_uid,
        kept_digest=kept_digest,
        other_digest=bytes(row.digest),
        ward=row.ward,
        device=row.device,
        received_at_us=row.received_at_us,
        location=location_of(row),
    )
