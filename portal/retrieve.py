"""WADO-RS retrieve of studies, series and instances (PS3.18 10.4): the stored Part 10 bytes as a stream,
with flat memory at any size, or written anew where the client can't take them as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from archive.model import StoredInstance
from portal import multipart, transcode
from portal.context import Context
from portal.dicomweb import locate
from portal.negotiate import DICOM, MediaRange, NotAcceptable, accepted, forbid_mixture
from portal.transcode import EXPLICIT

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
        ranges = accepted(request.headers.get("accept"), request.query_params.get("accept"))
        forbid_mixture(ranges)
        visitor, found = await locate(self._context, request, "retrieve")
        single = "instance" in request.path_params
        bytes_max = self._context.settings.dicomweb.decoded_bytes_max
        chosen = [(stored, form_of(stored, ranges, bytes_max, single=single)) for stored in found]
        sent = [(stored, form) for stored, form in chosen if form is not None]
        if not sent:
            raise NotAcceptable(refusal(found))
        if single and is_bare(ranges):
            return self._bare(*sent[0])
        mark = multipart.boundary()
        chunks = multipart.body((self._part(stored, form) for stored, form in sent), mark)
        status = HTTPStatus.OK if len(sent) == len(found) else HTTPStatus.PARTIAL_CONTENT
        return StreamingResponse(
            self._context.read.stream(chunks), status, media_type=multipart.content_type(DICOM, mark)
        )

    def _bare(self, stored: StoredInstance, form: Form) -> Response:
        syntax = stored.head.transfer_syntax_uid if form is Form.STORED else EXPLICIT
        response = StreamingResponse(
            self._context.read.stream(self._chunks(stored, form)),
            media_type=f"{DICOM}; transfer-syntax={syntax}",
        )
        if form is Form.STORED:
            response.headers["Content-Length"] = str(stored.location.length)
        return response

    def _part(self, stored: StoredInstance, form: Form) -> multipart.Part:
        syntax = stored.head.transfer_syntax_uid if form is Form.STORED else EXPLICIT
        return multipart.Part(f"{DICOM}; transfer-syntax={syntax}", self._chunks(stored, form))

    def _chunks(self, stored: StoredInstance, form: Form) -> Iterator[bytes]:
        with self._context.source.open_payload(stored) as payload:
            if form is Form.EXPLICIT:
                yield transcode.explicit_part10(
                    payload, stored, self._context.settings.dicomweb.decoded_bytes_max
                )
                return
            while chunk := payload.read(CHUNK_BYTES):
                yield chunk


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
        if transcode.can_be_explicit(stored, bytes_max) and (
            wanted or syntax in transcode.NATIVE or syntax in transcode.LOSSLESS
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
