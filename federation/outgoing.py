"""Instances of an archive as the messages of a push stream, for whoever sends them: small ones in groups,
large ones in chunks of at most 1 MiB. Whose they are and who may have them was decided before; the bytes of
each were checked against its digest before its last message goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from archive.archive import Archive
from archive.errors import MissError
from archive.model import Scope
from federation.reading import Content, checked_chunks, raise_if_passing
from protos import uplink_pb2

GROUP_BYTES_MAX = 1 << 20
GROUP_OBJECTS_MAX = 128

Blame = Callable[[Content, MissError | OSError], None]


def messages(
    archive: Archive, outgoing: Iterable[tuple[Content, uplink_pb2.PushBegin]], blame: Blame
) -> Iterator[uplink_pb2.PushRequest]:
    """These contents in their order. `blame` is told of one that can't be read, which is left out; when it
    breaks off in between, so does the stream."""
    group, size = uplink_pb2.PushGroup(), 0
    for content, begin in outgoing:
        is_large = content.size > GROUP_BYTES_MAX
        dataset = None if is_large else _whole(archive, content, blame)
        if dataset is None and not is_large:
            continue
        is_full = dataset is not None and (
            size + len(dataset) > GROUP_BYTES_MAX or len(group.objects) >= GROUP_OBJECTS_MAX
        )
        if group.objects and (is_large or is_full):
            yield uplink_pb2.PushRequest(group=group)
            group, size = uplink_pb2.PushGroup(), 0
        if dataset is None:
            yield from _in_chunks(archive, content, begin, blame)
            continue
        group.objects.append(uplink_pb2.PushWhole(begin=begin, dataset=dataset, digest=content.digest))
        size += len(dataset)
    if group.objects:
        yield uplink_pb2.PushRequest(group=group)


def is_held_by(archive: Archive, ward: str, uid: str, digest: bytes) -> bool:
    """Whether this archive has the content from that ward. Of a content that is kept beside another only the
    first ward is known: there the digest, which nobody knows without the bytes, is enough."""
    known = archive.index.lookup(uid)
    if known is not None and known.digest == digest:
        own = Scope(frozenset({ward}))
        return bool(archive.index.instances(known.study_uid, known.series_uid, uid, scope=own))
    return archive.index.has_content(uid, digest)


def _whole(archive: Archive, content: Content, blame: Blame) -> bytes | None:
    try:
        return b"".join(_chunks(archive, content))
    except (MissError, OSError) as error:
        raise_if_passing(error)
        blame(content, error)
        return None


def _in_chunks(
    archive: Archive, content: Content, begin: uplink_pb2.PushBegin, blame: Blame
) -> Iterator[uplink_pb2.PushRequest]:
    yield uplink_pb2.PushRequest(begin=begin)
    try:
        for chunk in _chunks(archive, content):
            yield uplink_pb2.PushRequest(chunk=chunk)
    except (MissError, OSError) as error:
        raise_if_passing(error)
        blame(content, error)
        raise
    yield uplink_pb2.PushRequest(end=uplink_pb2.PushEnd(digest=content.digest))


def _chunks(archive: Archive, content: Content) -> Iterator[bytes]:
    return checked_chunks(archive, content.head.sop_instance_uid, content.digest, content.location)
