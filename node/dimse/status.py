"""Owns the translation of errors to DIMSE status codes (PS3.7 Annex C, PS3.4 Table B.2-1 and C.4-1), one line
for each class of `archive/errors.py`. It never formats a message: the Error Comment is the error's own
text."""

from __future__ import annotations

from archive import errors

SUCCESS = 0x0000
CANCELLED = 0xFE00
PENDING = 0xFF00
PENDING_UNSUPPORTED_KEYS = 0xFF01  # matches go on; an optional key was not matched (PS3.4 Table C.4-1)
INVALID_ATTRIBUTE_VALUE = 0x0106
ATTRIBUTE_LIST_ERROR = 0x0107
PROCESSING_FAILURE = 0x0110
DUPLICATE_INSTANCE = 0x0111
NO_SUCH_INSTANCE = 0x0112
NO_SUCH_EVENT = 0x0113
INVALID_ARGUMENT = 0x0115
INVALID_INSTANCE = 0x0117
NO_SUCH_CLASS = 0x0118
MISSING_ATTRIBUTE = 0x0120
MISSING_ATTRIBUTE_VALUE = 0x0121
CLASS_NOT_SUPPORTED = 0x0122
NO_SUCH_ACTION = 0x0123
NOT_AUTHORIZED = 0x0124
UNRECOGNIZED_OPERATION = 0x0211
RESOURCE_LIMITATION = 0x0213
OUT_OF_RESOURCES = 0xA700
DOES_NOT_MATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000

STATUS: dict[type[errors.MissError], int] = {
    errors.InvalidInstance: INVALID_INSTANCE,
    errors.DatasetMismatch: DOES_NOT_MATCH,
    errors.InvalidQuery: DOES_NOT_MATCH,  # identifier does not match SOP class (C.4.1.1.4)
    errors.CannotUnderstand: CANNOT_UNDERSTAND,
    errors.UnsupportedClass: CLASS_NOT_SUPPORTED,
    errors.InvalidInput: CANNOT_UNDERSTAND,
    errors.NotFound: NO_SUCH_INSTANCE,
    errors.Gone: NO_SUCH_INSTANCE,
    errors.OtherContent: DUPLICATE_INSTANCE,
    errors.Forbidden: NOT_AUTHORIZED,
    errors.NotAuthenticated: NOT_AUTHORIZED,
    errors.OutOfResources: OUT_OF_RESOURCES,
    errors.Unavailable: OUT_OF_RESOURCES,  # a part that is needed is away: senders try A7xx again later
    errors.Evicted: OUT_OF_RESOURCES,
    errors.TooLarge: OUT_OF_RESOURCES,
    errors.SyncFailed: OUT_OF_RESOURCES,
    errors.Corrupt: PROCESSING_FAILURE,
    errors.SchemaTooNew: PROCESSING_FAILURE,
    errors.SettingsError: PROCESSING_FAILURE,
    errors.MissError: PROCESSING_FAILURE,
}

_MEANINGS = {
    SUCCESS: "success",
    CANCELLED: "cancelled",
    PENDING: "pending",
    PENDING_UNSUPPORTED_KEYS: "pending, some keys not matched",
    0x0105: "no such attribute",
    INVALID_ATTRIBUTE_VALUE: "invalid attribute value",
    ATTRIBUTE_LIST_ERROR: "attribute list error",
    PROCESSING_FAILURE: "processing failure",
    DUPLICATE_INSTANCE: "duplicate SOP instance",
    NO_SUCH_INSTANCE: "no such SOP instance",
    NO_SUCH_EVENT: "no such event type",
    INVALID_ARGUMENT: "invalid argument value",
    INVALID_INSTANCE: "invalid SOP instance UID",
    NO_SUCH_CLASS: "no such SOP class",
    MISSING_ATTRIBUTE: "missing attribute",
    MISSING_ATTRIBUTE_VALUE: "missing attribute value",
    CLASS_NOT_SUPPORTED: "SOP class not supported",
    NO_SUCH_ACTION: "no such action type",
    NOT_AUTHORIZED: "not authorized",
    0x0210: "duplicate invocation",
    UNRECOGNIZED_OPERATION: "unrecognized operation",
    0x0212: "mistyped argument",
    RESOURCE_LIMITATION: "resource limitation",
}
_RANGES = (
    (0xA700, 0xA7FF, "out of resources"),
    (0xA800, 0xA8FF, "move destination unknown"),
    (0xA900, 0xA9FF, "data set does not match"),
    (0xB000, 0xBFFF, "stored, with a warning"),
    (0xC000, 0xCFFF, "cannot understand"),
)


def status_of(error: errors.MissError) -> int:
    """The status of the nearest class in the tree: a subclass of another package's is answered as its
    parent."""
    for cls in type(error).__mro__:
        if cls in STATUS:
            return STATUS[cls]
    return PROCESSING_FAILURE


def is_stored(status: int) -> bool:
    """Whether a C-STORE response means that the peer keeps the instance: success or any warning (ST6)."""
    return status == SUCCESS or 0xB000 <= status <= 0xBFFF or status in (0x0001, 0x0107, 0x0116)


def meaning(status: int) -> str:
    """A status in words, for people."""
    if status in _MEANINGS:
        return _MEANINGS[status]
    for first, last, words in _RANGES:
        if first <= status <= last:
            return words
    return "an unknown status"
