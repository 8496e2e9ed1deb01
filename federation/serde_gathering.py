"""Translates what is said of instances that wards hold alone: `Listed` and `Coming` on the wire."""

from __future__ import annotations

from archive.errors import InvalidInput
from archive.model import Location, StoredInstance, require_uid
from archive.packs.records import part10_prefix
from federation import serde
from federation.gathering import Held
from protos import region_pb2, uplink_pb2


def listed_to(instance: StoredInstance) -> uplink_pb2.Listed:
    location = instance.location
    return uplink_pb2.Listed(
        study_uid=instance.study_uid,
        series_uid=instance.series_uid,
        head=serde.head_to(instance.head),
        digest=instance.digest,
        size=location.length - location.dataset_offset,
        instance=serde.fields_to(instance.instance),
    )


def listed_from(message: uplink_pb2.Listed, ward: str) -> StoredInstance:
    """An instance of that ward, located nowhere."""
    if message.size < 0:
        raise InvalidInput("an instance of less than no bytes")
    head = serde.head_from(message.head, ward=ward)
    before = len(part10_prefix(head))
    return StoredInstance(
        study_uid=require_uid(message.study_uid, "a Study Instance UID"),
        series_uid=require_uid(message.series_uid, "a Series Instance UID"),
        head=head,
        digest=serde.digest_from(message.digest),
        location=Location("", 0, before + message.size, before),
        instance=serde.fields_from(message.instance),
    )


def coming_to(held: Held) -> region_pb2.Coming:
    return region_pb2.Coming(ward=held.ward, listed=listed_to(held.instance))


def coming_from(message: region_pb2.Coming) -> Held:
    return Held(message.ward, listed_from(message.listed, message.ward))
