"""WADO-RS retrieve of studies, series and instances (PS3.18 10.4): the stored Part 10 bytes as a stream,
with flat memory at any size, or written anew where the client can't take them as they are."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from enum import Enum
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from archive.dataset import recoding
from archive.dataset.encoding import EXPLICIT_LITTLE as EXPLICIT
from archive.errors import EVICTED, CannotUnderstand, Evicted, TooLarge
from archive.model import StoredInstance
from federation.gathering import Awaited
from portal import multipart
from portal.context import Context
from portal.dicomweb import accept_of, is_awaited, locate, reading, said_to_lack
from portal.negotiate import DICOM, MediaRange, NotAcceptable, forbid_mixture
from portal.signin import Visitor

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
PATHS = (
    "/studies/{study}",
    "/studies/{study}/series/{series}",
    "/studies/{study}/series/{series}/instances/{instance}",
)


class Form(Enum):
    """How one instance leaves."""

    STORED = "stored"
    EXPLICIT = "explicit"


class Retrieve:
    """The routes below `root`."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def routes(self, root: str) -> list[BaseRoute]:
        return [Route(root + path, self.retrieve) for path in PATHS]

    async def retrieve(self, request: Request) -> Response:
        ranges = accept_of(request)
        forbid_mixture(ranges)
        visitor, found = await locate(self._context, request, "retrieve")
        single = "instance" in request.path_params
        bytes_max = self._context.settings.dicomweb.decoded_bytes_max
        here = [stored for stored in found if not stored.evicted]
        if not here:
            raise Evicted(EVICTED)
        chosen = [(stored, form_of(stored, ranges, bytes_max, single=single)) for stored in here]
        sent = [(stored, form) for stored, form in chosen if form is not None]
        if not sent:
            raise NotAcceptable(refusal(found))
        # What is written anew is computed, not only read: that has threads of its own.
        anew = any(form is Form.EXPLICIT for _, form in sent)
        if anew and single:
            sent = [(await reading(self._context, found).run(self._context.source.arrived, each), form)
                    for each, form in sent]  # fmt: skip
        pool = self._context.decode if anew else reading(self._context, found)
        mark = multipart.boundary()
        if not single:
            whole = len(sent) == len(found) and not found.lacking
            status = HTTPStatus.OK if whole else HTTPStatus.PARTIAL_CONTENT
            if is_awaited(found):
                body = self._as_they_come(visitor, sent, mark)
            else:
                parts = (self._part(stored, form) for stored, form in sent)
                body = pool.stream(multipart.body(parts, mark))
            headers = said_to_lack(found)
            return StreamingResponse(
                body, status, headers, media_type=multipart.content_type(DICOM, mark)
            )
        part = await pool.run(self._one, *sent[0], ranges, visitor)
        if not is_bare(ranges):
            body = pool.stream(multipart.body([part], mark))
            return StreamingResponse(body, media_type=multipart.content_type(DICOM, mark))
        response = StreamingResponse(pool.stream(iter(part.content)), media_type=part.content_type)
        if not anew and found[0].corrections is None:  # else what leaves is longer than what is stored
            response.headers["Content-Length"] = str(found[0].location.length)
        return response

    async def _as_they_come(
        self, visitor: Visitor, sent: Sequence[tuple[StoredInstance, Form]], mark: str
    ) -> AsyncIterator[bytes]:
        """The parts, each as soon as its instance is here, a large one while it arrives. One that does not
        come ends the answer without its last boundary: it is not taken for a whole study."""
        source, first = self._context.source, True
        for stored, form in sent:
            pool = self._context.fetch
            if form is Form.EXPLICIT:  # no thread that computes waits for a ward
                stored, pool = await pool.later(source.arrived, stored), self._context.decode
            part = await pool.later(self._part, stored, form, visitor)
            async for chunk in pool.stream(multipart.gather(multipart.pieces([part], mark, first=first))):
                yield chunk
            first = False
        yield multipart.end(mark)

    def _one(
        self, stored: StoredInstance, form: Form, ranges: Sequence[MediaRange], visitor: Visitor
    ) -> multipart.Part:
        """One instance alone, begun before the answer is: when that fails, the status can say so."""
        part = self._part(stored, form, visitor)
        chunks = iter(part.content)
        part = multipart.Part(part.content_type, multipart.resumed(next(chunks, b""), chunks))
        if form is Form.EXPLICIT and part.content_type != content_type(EXPLICIT) and insists(ranges):
            raise NotAcceptable(refusal([stored]))
        return part

    def _part(
        self, stored: StoredInstance, form: Form, visitor: Visitor | None = None
    ) -> multipart.Part:
        """What can't be written anew after all (broken pixel data, say) leaves as it is stored: the part's
        type says which it is, and nothing of a study is held back."""
        if form is Form.EXPLICIT:
            bytes_max = self._context.settings.dicomweb.decoded_bytes_max
            try:
                with self._context.source.open_payload(stored) as payload:
                    written = recoding.explicit_part10(payload, stored, bytes_max)
                return multipart.Part(content_type(EXPLICIT), [written])
            except (CannotUnderstand, TooLarge) as error:
                log.info("instance %s leaves as it is stored: %s", stored.head.sop_instance_uid, error)
        return multipart.Part(content_type(stored.head.transfer_syntax_uid), self._stored(stored, visitor))

    def _stored(self, stored: StoredInstance, visitor: Visitor | None) -> Iterator[bytes]:
        if visitor is not None and isinstance(stored, Awaited):
            yield from self._context.source.passing(visitor.principal, stored)
            return
        with self._context.source.open_payload(stored) as payload:
            while chunk := payload.read(CHUNK_BYTES):
                yield chunk


def content_type(transfer_syntax_uid: str) -> str:
    return f"{DICOM}; transfer-syntax={transfer_syntax_uid}"


def insists(ranges: Sequence[MediaRange]) -> bool:
    """Whether every range that an instance could leave by names another transfer syntax than what is
    stored."""
    return all(r.transfer_syntax for r in ranges if r.takes(DICOM))


def form_of(
    stored: StoredInstance, ranges: Sequence[MediaRange], bytes_max: int, *, single: bool
) -> Form | None:
    """How this instance may leave by the best range that it can satisfy, None when by none."""
    syntax = stored.head.transfer_syntax_uid
    for accepted_range in ranges:
        if not accepted_range.takes(DICOM) or not (
            accepted_range.is_multipart or single or accepted_range.media == "*/*"
        ):
            continue
        wanted = accepted_range.transfer_syntax
        if wanted in ("*", syntax):
            return Form.STORED
        if wanted not in ("", EXPLICIT):
            continue
        if recoding.can_be_explicit(stored, bytes_max) and (
            wanted or syntax in recoding.NATIVE or syntax in recoding.LOSSLESS
        ):
            return Form.STORED if syntax == EXPLICIT else Form.EXPLICIT
        if not wanted:
            return Form.STORED  # lossy, or too large uncompressed: stays as it is (PS3.18 8.7.3.5.2)
    return None


def is_bare(ranges: Sequence[MediaRange]) -> bool:
    """Whether one instance is wanted without multipart: the first range that can be met decides (W4)."""
    return next((not r.is_multipart for r in ranges if r.takes(DICOM)), False)


def refusal(found: Sequence[StoredInstance]) -> str:
    syntaxes = ", ".join(sorted({stored.head.transfer_syntax_uid for stored in found}))
    return (
        f'stored in {syntaxes}: accept multipart/related; type="{DICOM}"; transfer-syntax=* to have it so'
        " (a bare application/dicom holds one instance only)"
    )
