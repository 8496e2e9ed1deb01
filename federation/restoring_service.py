"""The hub's end of restoring: gives a ward back what the region holds of that ward, as the messages of a push
stream, so that the ward takes them through its own intake. Who calls is the certificate's word, by
`certs/gate.py`; a ward gets what it gave, or what the region knows it to hold as well, and nothing else.

Bounds: 256 instances in a call, fetches at once in all and for each ward, each with about 1 MiB in memory;
a ward that takes nothing for five minutes loses its place.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from archive.archive import Archive
from archive.errors import InvalidInput, MissError, OutOfResources
from certs.gate import peer
from federation import serde, status
from federation.outgoing import is_held_by, messages
from federation.pools import Pools
from federation.reading import Content, find_content
from protos import restore_pb2, restore_pb2_grpc, uplink_pb2

log = logging.getLogger(__name__)

KEYS_MAX = 256
FETCHES_MAX = 32
FETCHES_PER_WARD_MAX = 4


class RestoreService(restore_pb2_grpc.RestoreServicer):
    """Implements `miss.v1.Restore`."""

    def __init__(self, archive: Archive, pools: Pools) -> None:
        self._archive = archive
        self._pools = pools
        self._fetches: Counter[str] = Counter()

    async def Fetch(  # type: ignore[override]
        self, request: restore_pb2.RestoreRequest, context: Any
    ) -> None:
        ward = peer(context).ward
        if self._fetches.total() >= FETCHES_MAX or self._fetches[ward] >= FETCHES_PER_WARD_MAX:
            await status.abort(context, OutOfResources("too many fetches at once"))
        self._fetches[ward] += 1
        try:
            # The place is free before the call is ended: its end waits behind what its reader did not take.
            try:
                await self._give(ward, request, context)
            finally:
                self._fetches[ward] -= 1
        except Exception as error:
            await status.abort(context, error)

    async def _give(self, ward: str, request: restore_pb2.RestoreRequest, context: Any) -> None:
        if len(request.keys) > KEYS_MAX:
            raise InvalidInput(f"more than {KEYS_MAX} instances at once")
        keys = [(key.sop_instance_uid, serde.digest_from(key.digest)) for key in request.keys]
        given = given_back(self._archive, ward, keys)
        while (message := await self._pools.work(next, given, None)) is not None:
            await status.write(context, message)


def given_back(
    archive: Archive, ward: str, keys: Sequence[tuple[str, bytes]]
) -> Iterator[uplink_pb2.PushRequest]:
    """What the region holds of that ward among these, as messages; it reads when the next is asked for."""
    archive.wait_indexed()
    return messages(archive, _outgoing(archive, ward, keys), _blame)


def _outgoing(
    archive: Archive, ward: str, keys: Sequence[tuple[str, bytes]]
) -> Iterator[tuple[Content, uplink_pb2.PushBegin]]:
    for uid, digest in dict.fromkeys(keys):
        if not is_held_by(archive, ward, uid, digest):
            continue
        content = find_content(archive, uid, digest)
        if content is None:
            continue
        live = archive.index.lookup(uid)
        # A content that lost to another ward's may be the live one of the ward that asks.
        beside = live is not None and live.digest != digest and is_held_by(archive, ward, uid, live.digest)
        yield content, uplink_pb2.PushBegin(
            head=serde.head_to(content.head), size=content.size, conflict=beside, digest=digest
        )


def _blame(content: Content, error: MissError | OSError) -> None:
    words = str(error) if isinstance(error, MissError) else f"its pack can't be read ({error.strerror})"
    log.error("%s can't be given back: %s", content.head.sop_instance_uid, words)
