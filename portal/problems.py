"""The one table from MISS's errors to HTTP answers, as problem details (RFC 9457). It decides no policy and
never shows an exception that is not a MissError: those are logged in full and answered blandly."""

from __future__ import annotations

import logging
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from archive.errors import (
    CannotUnderstand,
    Corrupt,
    DatasetMismatch,
    Evicted,
    Forbidden,
    Gone,
    InvalidInput,
    InvalidInstance,
    InvalidQuery,
    MissError,
    NotAuthenticated,
    NotFound,
    OtherContent,
    OutOfResources,
    SchemaTooNew,
    SettingsError,
    SyncFailed,
    TooLarge,
    Unavailable,
    UnsupportedClass,
)
from portal.negotiate import NotAcceptable

log = logging.getLogger(__name__)

# Each class of the tree by itself, so that a test can show the table complete.
STATUSES: dict[type[MissError], HTTPStatus] = {
    MissError: HTTPStatus.INTERNAL_SERVER_ERROR,
    InvalidInput: HTTPStatus.BAD_REQUEST,
    InvalidInstance: HTTPStatus.BAD_REQUEST,
    DatasetMismatch: HTTPStatus.CONFLICT,
    CannotUnderstand: HTTPStatus.UNPROCESSABLE_ENTITY,
    UnsupportedClass: HTTPStatus.CONFLICT,
    InvalidQuery: HTTPStatus.BAD_REQUEST,
    NotFound: HTTPStatus.NOT_FOUND,
    Gone: HTTPStatus.GONE,
    OtherContent: HTTPStatus.CONFLICT,
    Forbidden: HTTPStatus.FORBIDDEN,
    NotAuthenticated: HTTPStatus.UNAUTHORIZED,
    OutOfResources: HTTPStatus.SERVICE_UNAVAILABLE,
    Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    Evicted: HTTPStatus.SERVICE_UNAVAILABLE,
    TooLarge: HTTPStatus.CONTENT_TOO_LARGE
    if hasattr(HTTPStatus, "CONTENT_TOO_LARGE")
    else HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Corrupt: HTTPStatus.INTERNAL_SERVER_ERROR,
    SyncFailed: HTTPStatus.SERVICE_UNAVAILABLE,
    SchemaTooNew: HTTPStatus.SERVICE_UNAVAILABLE,
    SettingsError: HTTPStatus.INTERNAL_SERVER_ERROR,
}

RETRY_AFTER_S = 5

# What does not exist and what may not be seen are one answer, to the byte (PS3.18 8.5, W11).
NOT_FOUND_DETAIL = "no such study, series, instance or frame"


def status_of(error: MissError) -> HTTPStatus:
    """The status of the nearest class in the table."""
    return next(STATUSES[c] for c in type(error).__mro__ if c in STATUSES)


def problem(status: HTTPStatus, detail: str, headers: dict[str, str] | None = None) -> Response:
    content = {"type": "about:blank", "title": status.phrase, "status": int(status), "detail": detail}
    return JSONResponse(content, int(status), headers, "application/problem+json")


def from_error(error: Exception) -> Response:
    """The problem that answers for `error`."""
    if isinstance(error, NotAcceptable):
        return problem(HTTPStatus.NOT_ACCEPTABLE, str(error))
    if isinstance(error, HTTPException):
        return problem(HTTPStatus(error.status_code), error.detail, dict(error.headers or {}))
    if not isinstance(error, MissError):
        log.error("unexpected error", exc_info=error)
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "an unexpected error; it is in the portal's log")
    status = status_of(error)
    if status is HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("%s", type(error).__name__, exc_info=error)
    if status is HTTPStatus.NOT_FOUND:
        return problem(status, NOT_FOUND_DETAIL)
    later = status is HTTPStatus.SERVICE_UNAVAILABLE and not isinstance(error, Evicted)
    retry = {"Retry-After": str(RETRY_AFTER_S)} if later else None
    return problem(status, str(error) or status.phrase, retry)


async def answer(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for the DICOMweb side and whatever no page caught."""
    return from_error(error)
