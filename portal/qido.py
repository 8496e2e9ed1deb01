"""QIDO-RS (PS3.18 10.6): a query in a URL, asked of the source, answered as DICOM JSON or XML. It matches
nothing itself (`archive/matching.py` does, for C-FIND too) and says in every answer what that answer
covers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from archive.dataset import attributes
from archive.model import Level, Match, Query, is_uid, require_uid
from federation.coverage import WardCoverage, apart
from federation.policy import Act, decide
from federation.source import Answer
from portal import dicomxml, multipart
from portal.access import visitor_of
from portal.context import Context
from portal.dicomweb import accept_of, allow, base_url, compressed
from portal.listings import Listings, Paged
from portal.negotiate import (
    DICOM_JSON,
    DICOM_XML,
    NotAcceptable,
    first,
    forbid_mixture,
)
from portal.parameters import Asked, read

COVERAGE_WARDS_MAX = 64


@dataclass(frozen=True, slots=True)
class Resource:
    """What a path asks for: `level` of its answers, and the levels whose attributes they carry."""

    path: str
    level: Level
    levels: tuple[Level, ...]


# PS3.18 Table 10.6.1-1; patient attributes count as the study's.
RESOURCES = (
    Resource("/studies", Level.STUDY, (Level.STUDY,)),
    Resource("/studies/{study}/series", Level.SERIES, (Level.SERIES,)),
    Resource("/studies/{study}/instances", Level.IMAGE, (Level.SERIES, Level.IMAGE)),
    Resource("/studies/{study}/series/{series}/instances", Level.IMAGE, (Level.IMAGE,)),
    Resource("/series", Level.SERIES, (Level.STUDY, Level.SERIES)),
    Resource("/instances", Level.IMAGE, (Level.STUDY, Level.SERIES, Level.IMAGE)),
)


class Qido:
    """The search routes, below `root` and, bound to one person, below `root`/for/{opened}."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._listings = Listings(context.source)

    def routes(self, root: str) -> list[BaseRoute]:
        return [Route(root + resource.path, self._handler(resource)) for resource in RESOURCES]

    def _handler(self, resource: Resource) -> Any:
        async def search(request: Request) -> Response:
            return await self._search(request, resource)

        return search

    async def _search(self, request: Request, resource: Resource) -> Response:
        ranges = accept_of(request)
        forbid_mixture(ranges)
        chosen = first(ranges, [(DICOM_JSON, "json"), ("application/json", "json"), (DICOM_XML, "xml")])
        if chosen is None:
            raise NotAcceptable(f'a search answers {DICOM_JSON} or multipart/related; type="{DICOM_XML}"')
        asked = read(request.query_params.multi_items(), resource.level)
        query = self._query(request, resource, asked)
        subject = {"resource": resource.path, **request.path_params, **dict(query.keys)}
        await allow(self._context, request, Act.SEARCH, "search by DICOMweb", subject)
        paged = await self._ask(request, query)
        return await self._answer(request, resource, asked, paged, chosen[1])

    def _query(self, request: Request, resource: Resource, asked: Asked) -> Query:
        keys = dict(asked.keys)
        for name, keyword in (("study", "StudyInstanceUID"), ("series", "SeriesInstanceUID")):
            if name in request.path_params:
                keys[keyword] = require_uid(request.path_params[name], keyword)
        settings = self._context.settings.dicomweb
        limit = min(settings.results_default if asked.limit is None else asked.limit, settings.results_max)
        return Query(
            resource.level,
            tuple(keys.items()),
            combine_datetime=True,
            rules=asked.rules,
            limit=limit,
            offset=asked.offset,
        )

    async def _ask(self, request: Request, query: Query) -> Paged:
        """The source's answer. A question below `/for/{opened}` that does not name its study asks for a
        patient's other studies by a bare Patient ID: it is bound to the person of the study that was
        opened, since two hospitals may both use 123."""
        principal = visitor_of(request).principal
        source, run = self._context.source, self._context.search.run
        opened = request.path_params.get("opened")
        if opened is not None and not _names_studies(query):
            person = await run(source.person_of, principal, require_uid(opened, "the opened study"))
            if person is None or not person.patient_id:
                # Nobody's study, or a person without an ID: no other study can be known to be theirs.
                others = (key for key in query.keys if key[0] != "StudyInstanceUID")
                query = replace(query, keys=(*others, ("StudyInstanceUID", opened)))
            else:
                query = replace(query, person=frozenset({person}))
        if query.limit == 0:
            scope = decide(principal, Act.SEARCH).scope
            covered = [ward for ward in await run(source.coverage) if scope.allows(ward.ward)]
            return Paged(Answer([], covered), 0)
        return await run(self._listings.page, principal, query)

    async def _answer(
        self, request: Request, resource: Resource, asked: Asked, paged: Paged, form: str
    ) -> Response:
        answer = paged.answer
        service = f"{base_url(request)}/dicom-web"
        warnings = list(asked.warnings)
        if paged.remaining:
            count = f"{paged.remaining}" if paged.exact else f"at least {paged.remaining}"
            warnings.append(f"There are {count} additional results that can be requested")
        warnings += coverage_warnings(answer.coverage)
        if not answer.matches:
            return self._headed(Response(status_code=HTTPStatus.NO_CONTENT), service, warnings, answer)
        found = [self._json(match, resource, asked, service) for match in answer.matches]
        if form == "json":
            body = json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
            response = compressed(request, body, DICOM_JSON)
        else:
            mark = multipart.boundary()
            parts = [multipart.Part(DICOM_XML, [dicomxml.document(match)]) for match in found]
            response = Response(
                b"".join(multipart.body(parts, mark)), media_type=multipart.content_type(DICOM_XML, mark)
            )
        return self._headed(response, service, warnings, answer)

    def _json(self, match: Match, resource: Resource, asked: Asked, service: str) -> dict[str, Any]:
        """One result; what was matched on is returned too (Q5)."""
        wanted: set[str] | Literal["all"] = asked.includefield
        if wanted != "all":
            wanted = wanted | {keyword for keyword, _ in asked.keys}
        return attributes.to_json(
            match,
            wanted,
            level=resource.level,
            levels=resource.levels,
            retrieve_url=lambda found: retrieve_url(service, found),
        )

    def _headed(self, response: Response, service: str, warnings: list[str], answer: Answer) -> Response:
        response.headers["MISS-Coverage"] = coverage_header(answer.coverage)
        for words in warnings:
            # RFC 7234's warn-agent is the service (PS3.18 8.3.4.4); a header holds one line of ASCII.
            text = "".join(c if " " <= c <= "~" else "?" for c in words)
            response.headers.append("Warning", f"299 {service}: {text}")
        return response


def _names_studies(query: Query) -> bool:
    """Whether the studies that may match are named one by one: a key that is empty or a wildcard names none
    (PS3.4 C.2.2.2.3)."""
    named = next((value for keyword, value in query.keys if keyword == "StudyInstanceUID"), "")
    return all(is_uid(uid) for uid in named.split("\\"))


def retrieve_url(service: str, match: Match) -> str:
    url = f"{service}/studies/{match.study['StudyInstanceUID']}"
    if match.series.get("SeriesInstanceUID"):
        url += f"/series/{match.series['SeriesInstanceUID']}"
    if match.instance.get("SOPInstanceUID"):
        url += f"/instances/{match.instance['SOPInstanceUID']}"
    return url


def coverage_header(coverage: Sequence[WardCoverage]) -> str:
    """What the answer covers as one line of JSON: counts, and by ward its state, those that lack something
    first. At most 64 wards are named; `more` counts the others."""
    ordered = sorted(coverage, key=lambda ward: (ward.covered, ward.ward))
    named = {ward.ward: _ward_json(ward) for ward in ordered[:COVERAGE_WARDS_MAX]}
    body: dict[str, Any] = {
        "covered": sum(ward.covered for ward in coverage),
        "of": len(coverage),
        "wards": named,
    }
    if len(ordered) > COVERAGE_WARDS_MAX:
        body["more"] = len(ordered) - COVERAGE_WARDS_MAX
    return json.dumps(body, ensure_ascii=True, separators=(",", ":"))


def _ward_json(ward: WardCoverage) -> dict[str, Any]:
    entry: dict[str, Any] = {"state": ward.state.value}
    if ward.complete_to_us:
        entry["complete_to"] = datetime.fromtimestamp(ward.complete_to_us / 1e6, UTC).isoformat(
            timespec="seconds"
        )
    if ward.pending:
        entry["pending"] = ward.pending
    if ward.set_aside:
        entry["set_aside"] = ward.set_aside
    return entry


def coverage_warnings(coverage: Sequence[WardCoverage]) -> list[str]:
    """A warning that names the wards that are missing (Q10): incomplete is never shown as "no studies"."""
    missing = [ward for ward in coverage if not ward.covered]
    if not missing:
        aside = [f"{ward.title} ({apart(ward)})" for ward in coverage if apart(ward)][:COVERAGE_WARDS_MAX]
        words = "What is set aside at these wards is not in this answer"
        return [f"{words}: {'; '.join(aside)}"] if aside else []
    named = "; ".join(
        f"{ward.title} ({ward.reason or ward.state.value})" for ward in missing[:COVERAGE_WARDS_MAX]
    )
    more = len(missing) - COVERAGE_WARDS_MAX
    return [f"This answer is not complete: {named}" + (f"; and {more} more wards" if more > 0 else "")]
