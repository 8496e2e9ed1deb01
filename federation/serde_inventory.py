"""Inventories on the wire: keys, how contents stand, and what an index says of them; domain objects to
messages and back, checked on the way in."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from archive.errors import InvalidInput
from archive.index.inventory import Described
from archive.index.stubs import NOWHERE, stub_location
from archive.model import Attributes, IndexEntry, Record, RecordKind, require_uid
from federation import serde
from federation.reconcile_tree import HASH_BYTES, Content
from protos import inventory_pb2

KEYS_MAX = 500
_LENGTH_MAX = 1 << 44


def keys_to(contents: Iterable[Content]) -> list[inventory_pb2.ContentKey]:
    return [inventory_pb2.ContentKey(sop_instance_uid=uid, digest=digest) for uid, digest in contents]


def keys_from(messages: Sequence[inventory_pb2.ContentKey], *, at_most: int = KEYS_MAX) -> list[Content]:
    if len(messages) > at_most:
        raise InvalidInput(f"more than {at_most} contents at once")
    return [
        (require_uid(key.sop_instance_uid, "a SOP Instance UID"), serde.digest_from(key.digest))
        for key in messages
    ]


def sums_to(values: Iterable[int]) -> bytes:
    return b"".join(value.to_bytes(HASH_BYTES, "big") for value in values)


def sums_from(data: bytes) -> list[int]:
    if len(data) % HASH_BYTES:
        raise InvalidInput("sums are of 16 bytes each")
    return [int.from_bytes(data[at : at + HASH_BYTES], "big") for at in range(0, len(data), HASH_BYTES)]


def series_to(described: Sequence[Described]) -> inventory_pb2.SeriesOfContents:
    """Of contents that lie series beside series."""
    reply = inventory_pb2.SeriesOfContents()
    for _, group in itertools.groupby(described, key=_series_key):
        ones = list(group)
        reply.series.append(inventory_pb2.SeriesOfContents.Series(
            patient=serde.fields_to(ones[0].patient), study=serde.fields_to(ones[0].study),
            series=serde.fields_to(ones[0].series),
            contents=[
                inventory_pb2.SeriesOfContents.Content(
                    head=serde.head_to(one.stored.head), digest=one.stored.digest,
                    length=one.stored.location.length, dataset_offset=one.stored.location.dataset_offset,
                    fields=serde.fields_to(one.stored.instance),
                )
                for one in ones
            ],
        ))  # fmt: skip
    return reply


def _series_key(one: Described) -> tuple[str, str]:
    return one.stored.study_uid, one.stored.series_uid


def entries_from(reply: inventory_pb2.SeriesOfContents, *, ward: str) -> Iterator[IndexEntry]:
    """As entries that lie nowhere, this ward's: what another one acquired was delivered to it."""
    for series in reply.series:
        patient, study = serde.fields_from(series.patient), serde.fields_from(series.study)
        levels = serde.fields_from(series.series)
        require_uid(study.get("StudyInstanceUID", ""), "a Study Instance UID")
        require_uid(levels.get("SeriesInstanceUID", ""), "a Series Instance UID")
        for one in series.contents:
            if not 0 <= one.dataset_offset <= one.length <= _LENGTH_MAX:
                raise InvalidInput("a content has no such length")
            record = Record(
                RecordKind.INSTANCE, 0, serde.head_from(one.head, ward=ward),
                serde.digest_from(one.digest), stub_location(one.length, one.dataset_offset), NOWHERE,
            )  # fmt: skip
            yield IndexEntry(record, Attributes(patient, study, levels, serde.fields_from(one.fields)))
