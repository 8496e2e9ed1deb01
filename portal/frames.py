"""WADO-RS frames (PS3.18 10.4.1.1.6): single frames of an image, as they are stored wherever the client takes
that. A viewer decodes by itself; only a client that insists on uncompressed octets has them decoded here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from archive.dataset import frames, recoding
from archive.dataset.encoding import EXPLICIT_LITTLE as EXPLICIT
from archive.errors import CannotUnderstand, InvalidQuery, NotFound, TooLarge
from archive.model import StoredInstance
from portal import multipart, pixels
from portal.context import Context
from portal.dicomweb import accept_of, locate
from portal.negotiate import OCTETS, MediaRange, NotAcceptable, forbid_mixture

PATH = "/studies/{study}/series/{series}/instances/{instance}/frames/{frames}"
FRAMES_MAX = 1_000
BATCH_FRAMES = 16
FRAME_LIST_CHARS_MAX = 8_000


@dataclass(frozen=True, slots=True)
class Encoded:
    """Frames ready to send, all of one media type and transfer syntax."""

    media_type: str
    transfer_syntax: str
    frames: Sequence[bytes]

    @property
    def content_type(self) -> str:
        # The parameter is what a viewer goes by: a media type alone does not tell one codec from another.
        return f"{self.media_type}; transfer-syntax={self.transfer_syntax}"


@dataclass(frozen=True, slots=True)
class First:
    """The first batch of an answer, and what decided its form."""

    accepted: MediaRange
    encoded: Encoded
    layout: frames.Layout
    decode: bool


class Frames:
    """The route below `root`."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def routes(self, root: str) -> list[BaseRoute]:
        return [Route(root + PATH, self.answer)]

    async def answer(self, request: Request) -> Response:
        ranges = accept_of(request)
        forbid_mixture(r for r in ranges if not r.media.startswith("image/"))
        numbers = frame_numbers(request.path_params["frames"])
        _, found = await locate(self._context, request, "view", here=True)
        batches = [numbers[at : at + BATCH_FRAMES] for at in range(0, len(numbers), BATCH_FRAMES)]
        # The first batch is read before the answer begins: what is not there, or not acceptable, must say so.
        layout, as_stored = await self._context.read.run(self._look, found[0], numbers, batches[0])
        first = await self._form(found[0], batches[0], ranges, layout, as_stored, alone=len(numbers) == 1)
        if not first.accepted.is_multipart and len(numbers) == 1:
            return Response(first.encoded.frames[0], media_type=first.encoded.content_type)
        mark = multipart.boundary()
        content_type = multipart.content_type(first.encoded.media_type, mark, first.encoded.transfer_syntax)
        body = multipart.body(self._parts(found[0], first, batches[1:]), mark)
        if len(batches) == 1:
            return Response(b"".join(body), media_type=content_type)
        pool = self._context.decode if first.decode else self._context.read
        return StreamingResponse(pool.stream(body), media_type=content_type)

    def _look(
        self, stored: StoredInstance, numbers: Sequence[int], batch: Sequence[int]
    ) -> tuple[frames.Layout, Encoded]:
        """Where the frames lie, and the first batch as it is stored."""
        with self._context.source.open_payload(stored) as payload:
            layout = frames.layout(payload)
            if max(numbers) > (1 if layout.is_video else layout.number_of_frames):
                raise NotFound("no such frame")
            return layout, self._stored(payload, batch, layout)

    async def _form(
        self,
        stored: StoredInstance,
        batch: Sequence[int],
        ranges: Sequence[MediaRange],
        layout: frames.Layout,
        as_stored: Encoded,
        *,
        alone: bool,
    ) -> First:
        """The first batch in the best form that the client takes; decoded only for those who insist."""
        for accepted_range in ranges:
            if not accepted_range.is_multipart and not alone:
                continue
            if takes_stored(accepted_range, as_stored):
                return First(accepted_range, as_stored, layout, decode=False)
            if wants_octets(accepted_range):
                decoded = await self._context.decode.run(self._decoded, stored, batch)
                if decoded is not None:
                    return First(accepted_range, decoded, layout, decode=True)
        raise NotAcceptable(
            f"these frames are stored as {as_stored.media_type} in {as_stored.transfer_syntax}: accept "
            f"multipart/related; type={OCTETS}; transfer-syntax=* to have them as they are"
        )

    def _parts(
        self, stored: StoredInstance, first: First, batches: Sequence[Sequence[int]]
    ) -> Iterator[multipart.Part]:
        """Batch after batch, so that a list of a thousand frames takes no more memory than one of sixteen."""
        for frame in first.encoded.frames:
            yield multipart.Part(first.encoded.content_type, [frame])
        for batch in batches:
            encoded = (
                self._decoded(stored, batch) if first.decode else self._again(stored, batch, first.layout)
            )
            if encoded is None:
                raise CannotUnderstand("a frame can't be decoded")  # the answer has begun: it ends cut short
            for frame in encoded.frames:
                yield multipart.Part(encoded.content_type, [frame])

    def _again(self, stored: StoredInstance, batch: Sequence[int], layout: frames.Layout) -> Encoded:
        with self._context.source.open_payload(stored) as payload:
            return self._stored(payload, batch, layout)

    def _stored(self, payload: BinaryIO, batch: Sequence[int], layout: frames.Layout) -> Encoded:
        bytes_max = self._context.settings.dicomweb.decoded_bytes_max
        found = frames.read(payload, batch, known=layout, bytes_max=bytes_max)
        return Encoded(found.media_type, found.transfer_syntax_uid, found.frames)

    def _decoded(self, stored: StoredInstance, numbers: Sequence[int]) -> Encoded | None:
        bytes_max = self._context.settings.dicomweb.decoded_bytes_max
        if not recoding.can_be_explicit(stored, bytes_max):
            return None
        with self._context.source.open_payload(stored) as payload:
            try:
                return Encoded(OCTETS, EXPLICIT, pixels.decoded_frames(payload, stored, numbers, bytes_max))
            except (CannotUnderstand, TooLarge):
                return None


def takes_stored(accepted_range: MediaRange, stored: Encoded) -> bool:
    """Whether the frames may go as they are. `application/octet-stream; transfer-syntax=*` is how viewers
    ask for whatever there is; a media type without a transfer syntax takes any that it can hold."""
    wanted = accepted_range.transfer_syntax
    if stored.media_type == OCTETS:
        return accepted_range.takes(OCTETS) and wanted in ("", "*", stored.transfer_syntax)
    if accepted_range.wanted == OCTETS:
        return wanted in ("*", stored.transfer_syntax)
    return accepted_range.takes(stored.media_type) and wanted in ("", "*", stored.transfer_syntax)


def wants_octets(accepted_range: MediaRange) -> bool:
    return accepted_range.takes(OCTETS) and accepted_range.transfer_syntax in ("", EXPLICIT)


def frame_numbers(text: str) -> list[int]:
    """The list of a path: numbers from 1, comma between (PS3.18 10.4.1.1.6)."""
    parts = text.split(",") if len(text) <= FRAME_LIST_CHARS_MAX else []
    if not 0 < len(parts) <= FRAMES_MAX:
        raise InvalidQuery(f"a list of 1 to {FRAMES_MAX} frames is needed")
    if not all(part.isascii() and part.isdigit() and len(part) <= 9 and int(part) > 0 for part in parts):
        raise InvalidQuery("frames are numbered from 1")
    return [int(part) for part in parts]
