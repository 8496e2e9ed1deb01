"""WADO-RS metadata and bulk data (PS3.18 10.4.1.1.2): whole data sets as DICOM JSON or XML, with pixel data
and other large binaries behind URIs that return their bytes."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from archive.dataset import attributes, dicomjson
from archive.errors import CannotUnderstand, Evicted, TooLarge
from archive.model import Level, Match, StoredInstance
from portal import dicomxml, multipart
from portal.context import Context
from portal.dicomweb import (
    LEVEL,
    accept_of,
    accepts_gzip,
    base_url,
    is_awaited,
    locate,
    reading,
    said_to_lack,
)
from portal.negotiate import (
    DICOM_JSON,
    DICOM_XML,
    OCTETS,
    NotAcceptable,
    first,
    forbid_mixture,
)
from portal.retrieve import PATHS

log = logging.getLogger(__name__)

BULK = "/studies/{study}/series/{series}/instances/{instance}/bulk/{path:path}"


class Metadata:
    """The routes below `root`."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def routes(self, root: str) -> list[BaseRoute]:
        return [
            *(Route(f"{root}{path}/metadata", self.metadata) for path in PATHS),
            Route(root + BULK, self.bulk),
        ]

    async def metadata(self, request: Request) -> Response:
        ranges = accept_of(request)
        forbid_mixture(ranges)
        chosen = first(ranges, [(DICOM_JSON, True), ("application/json", True), (DICOM_XML, False)])
        if chosen is None:
            raise NotAcceptable(f'metadata are {DICOM_JSON} or multipart/related; type="{DICOM_XML}"')
        _, found = await locate(self._context, request, "view")
        tag = etag(found)
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers={"ETag": tag})
        datasets = self._datasets(found, base_url(request))
        headers = {"ETag": tag, "Vary": "Accept, Accept-Encoding", **said_to_lack(found)}
        if chosen[1]:
            # What is on its way is told as it comes, not in large pieces.
            array = json_array(datasets)
            media_type, body = DICOM_JSON, array if is_awaited(found) else multipart.gather(array)
            if accepts_gzip(request):
                headers["Content-Encoding"] = "gzip"
                body = gzipped(body, at_once=is_awaited(found))
        else:
            mark = multipart.boundary()
            media_type = multipart.content_type(DICOM_XML, mark)
            body = multipart.body(
                (multipart.Part(DICOM_XML, [dicomxml.document(dataset)]) for dataset in datasets), mark
            )
        stream = reading(self._context, found).stream(body)
        return StreamingResponse(stream, headers=headers, media_type=media_type)

    def _datasets(self, found: Sequence[StoredInstance], base: str) -> Iterator[dict[str, Any]]:
        for stored in found:
            root = (
                f"{base}/dicom-web/studies/{stored.study_uid}/series/{stored.series_uid}"
                f"/instances/{stored.head.sop_instance_uid}/bulk/"
            )
            try:
                with self._context.source.open_payload(stored) as payload:
                    yield dicomjson.metadata(
                        payload, bulk_uri=partial(bulk_uri, root), issuer=stored.head.provenance.issuer
                    )
            except (CannotUnderstand, TooLarge, Evicted) as error:
                # One broken data set must not hide the others of its series: what the index knows stands
                # for it.
                log.info("instance %s has no whole metadata: %s", stored.head.sop_instance_uid, error)
                yield from_index(stored, root)

    async def bulk(self, request: Request) -> Response:
        ranges = accept_of(request)
        chosen = first(ranges, [(OCTETS, None)])
        if chosen is None:
            raise NotAcceptable(f"bulk data are {OCTETS}, alone or in multipart/related")
        _, found = await locate(self._context, request, "view", here=True)
        chunks = self._bulk_chunks(found[0], request.path_params["path"])
        # The first piece is read before the answer begins: what is not there must be a 404.
        head = await self._context.read.run(next, chunks, b"")
        if not chosen[0].is_multipart:
            return StreamingResponse(
                self._context.read.stream(multipart.resumed(head, chunks)), media_type=OCTETS
            )
        mark = multipart.boundary()
        body = multipart.body([multipart.Part(OCTETS, multipart.resumed(head, chunks))], mark)
        return StreamingResponse(
            self._context.read.stream(body), media_type=multipart.content_type(OCTETS, mark)
        )

    def _bulk_chunks(self, stored: StoredInstance, path: str) -> Iterator[bytes]:
        with self._context.source.open_payload(stored) as payload:
            yield from dicomjson.bulk(payload, path)


def from_index(stored: StoredInstance, bulk_root: str) -> dict[str, Any]:
    """What the index knows of an instance whose data set can't be read to its end."""
    match = Match(
        Level.IMAGE,
        stored.head.provenance.issuer,
        patient={},
        study={"StudyInstanceUID": stored.study_uid},
        series={"SeriesInstanceUID": stored.series_uid},
        instance=stored.instance,
    )
    return attributes.to_json(
        match, "all", level=Level.IMAGE, levels=(Level.STUDY, Level.SERIES, Level.IMAGE),
        retrieve_url=lambda _: bulk_root.removesuffix("/bulk/"),
    )  # fmt: skip


def bulk_uri(root: str, path: tuple[str, ...]) -> str:
    return root + "/".join(path)


def json_array(datasets: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    """The data sets as one JSON array, one at a time in memory."""
    start = b"["
    for dataset in datasets:
        text = json.dumps(dataset, ensure_ascii=False, separators=(",", ":"))
        yield start + text.encode("utf-8", "replace")
        start = b","
    yield b"]" if start == b"," else b"[]"


def gzipped(chunks: Iterator[bytes], *, at_once: bool = False) -> Iterator[bytes]:
    """Smaller; `at_once`, nothing of a chunk waits for the next one."""
    stream = zlib.compressobj(LEVEL, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    for chunk in chunks:
        if smaller := stream.compress(chunk) + (stream.flush(zlib.Z_SYNC_FLUSH) if at_once else b""):
            yield smaller
    yield stream.flush()


def etag(found: Sequence[StoredInstance]) -> str:
    """Of the contents, in the order in which they are answered, and of what is corrected of them."""
    running = hashlib.sha256()
    for stored in found:
        running.update(stored.digest)
        if stored.corrections is not None:
            running.update(repr(stored.corrections.values).encode("utf-8", "replace"))
    return f'W/"{running.hexdigest()[:32]}"'
