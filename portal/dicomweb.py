"""What the DICOMweb services share: the decision with its audit row, addresses as the client knows them, and
compressed answers. It serves no route itself."""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from archive.errors import Forbidden, NotFound
from archive.model import StoredInstance, require_uid
from federation.gathering import Awaited, Found
from federation.policy import Act, decide
from portal.access import address_of, visitor_of
from portal.context import Context
from portal.negotiate import MediaRange, accepted
from portal.signin import Visitor
from portal.workers import Workers

COMPRESSED_BYTES_MIN = 2_048
LEVEL = 4  # DICOM JSON shrinks tenfold already here, in a quarter of level 9's time


async def allow(
    context: Context, request: Request, act: Act, words: str, subject: Mapping[str, object]
) -> Visitor:
    """Who asks, if the decision allows it; the act is in the audit log when this returns."""
    visitor = visitor_of(request)
    decision = decide(visitor.principal, act)
    outcome = "success" if decision.allowed else "denied"
    await context.audit.record(visitor, words, subject, outcome, address_of(request))
    if not decision.allowed:
        raise Forbidden(decision.reason)
    return visitor


def accept_of(request: Request) -> list[MediaRange]:
    """What the caller accepts, best first; several header lines are one list (RFC 9110 5.3)."""
    header = ", ".join(request.headers.getlist("accept"))
    return accepted(header, request.query_params.get("accept"))


def base_url(request: Request) -> str:
    """Scheme and host as the client used them, so that addresses in answers work behind a proxy: the
    setting's when there is one, else what the request says."""
    context = request.app.state.context
    assert isinstance(context, Context)
    url = urlsplit(context.settings.listen.public_url)
    if url.netloc:
        return f"{url.scheme}://{url.netloc}"
    return f"{request.url.scheme}://{request.url.netloc}"


def accepts_gzip(request: Request) -> bool:
    return "gzip" in request.headers.get("accept-encoding", "")


def compressed(request: Request, body: bytes, media_type: str) -> Response:
    """`body` as a response, smaller when the client can read that."""
    headers = {"Vary": "Accept, Accept-Encoding"}
    if len(body) >= COMPRESSED_BYTES_MIN and accepts_gzip(request):
        body = gzip.compress(body, LEVEL, mtime=0)
        headers["Content-Encoding"] = "gzip"
    return Response(body, headers=headers, media_type=media_type)


def is_awaited(found: Sequence[StoredInstance]) -> bool:
    """Whether some of it is still on its way from a ward: reading it may wait."""
    return any(isinstance(each, Awaited) for each in found)


def reading(context: Context, found: Sequence[StoredInstance]) -> Workers:
    """The threads that read these: what is on its way keeps none of those that read what is here."""
    return context.fetch if is_awaited(found) else context.read


def said_to_lack(found: Found) -> dict[str, str]:
    """What an answer's headers say of what can't be had now."""
    return {"Warning": f'299 MISS "incomplete: {_plain(found.lacking)}"'} if found.lacking else {}


def _plain(words: str) -> str:
    return "".join(c if " " <= c <= "~" and c not in '"\\' else "?" for c in words)


async def locate(
    context: Context, request: Request, words: str, *, here: bool = False
) -> tuple[Visitor, Found]:
    """Who asks, and the instances that the path names; NotFound when there are none or none that may be
    seen. What only a ward holds is asked for, and on its way when this returns; with `here` it has arrived.
    The audit log knows of it when this returns: hundreds of requests for frames of one study are one row,
    each study that was not found is one."""
    names = ("study", "series", "instance")
    uids = {n: require_uid(request.path_params[n], f"the {n}") for n in names if n in request.path_params}
    visitor = visitor_of(request)
    if not decide(visitor.principal, Act.READ).allowed:
        await allow(context, request, Act.READ, words, uids)  # denied, written and refused
    try:
        asked = visitor.principal, uids["study"], uids.get("series"), uids.get("instance")
        found = await context.read.run(context.source.at_hand, *asked)
        if found is None:
            found = await context.fetch.run(context.source.instances, *asked)
        if here and is_awaited(found):
            found = Found([await context.fetch.run(context.source.arrived, each) for each in found])
    except NotFound:
        await context.audit.record(visitor, words, uids, "not found", address_of(request))
        raise
    await context.audit.seen(visitor, words, uids["study"], address_of(request))
    return visitor, found
