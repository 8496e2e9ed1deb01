"""Rows of instances and conflicts back as domain objects. It reads rows that others fetched."""

from __future__ import annotations

from typing import Any

from archive.catalog import at_level
from archive.index.schema import instance
from archive.model import (
    ConflictRow,
    ConflictState,
    InstanceHead,
    Level,
    Location,
    Provenance,
    StoredInstance,
)

_OF_IMAGE = at_level(Level.IMAGE)
_KEYWORDS = tuple(entry.keyword for entry in _OF_IMAGE)

# What a StoredInstance is made of, in the order in which `instance_of` takes it: by place, since a retrieve
# reads hundreds, and by name each took three times as long.
INSTANCE_COLUMNS = (
    *(instance.c[name] for name in (
        "study_instance_uid", "series_instance_uid", "sop_class_uid", "sop_instance_uid",
        "transfer_syntax_uid", "ward", "issuer", "device", "calling_ae", "received_at_us", "digest", "pack",
        "payload_offset", "payload_length", "dataset_offset", "evicted", "damaged",
    )),
    *(instance.c[entry.column].label(f"image_{entry.column}") for entry in _OF_IMAGE),
)  # fmt: skip


def head_of(row: Any) -> InstanceHead:
    source = Provenance(row.ward, row.issuer, row.device, row.calling_ae, row.received_at_us)
    return InstanceHead(row.sop_class_uid, row.sop_instance_uid, row.transfer_syntax_uid, source)


def location_of(row: Any) -> Location:
    return Location(row.pack, row.payload_offset, row.payload_length, row.dataset_offset)


def instance_of(row: Any) -> StoredInstance:
    """Of a row that begins with INSTANCE_COLUMNS."""
    (study_uid, series_uid, sop_class_uid, uid, syntax_uid, ward, issuer, device, calling_ae, received_at_us,
     digest, pack, offset, length, dataset_offset, evicted, damaged, *values) = row  # fmt: skip
    return StoredInstance(
        study_uid,
        series_uid,
        InstanceHead(
            sop_class_uid, uid, syntax_uid, Provenance(ward, issuer, device, calling_ae, received_at_us)
        ),
        bytes(digest),
        Location(pack, offset, length, dataset_offset),
        {keyword: value for keyword, value in zip(_KEYWORDS, values, strict=False) if value},
        bool(evicted),
        bool(damaged),
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
