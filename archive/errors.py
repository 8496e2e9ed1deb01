"""Every error that MISS raises on purpose, one class for each thing a caller does differently.

Messages carry UIDs, counts and names of settings, never patient data (a message ends in logs). Each edge
translates this tree once, by a table that a test holds complete: `node/dimse/status.py` (DIMSE status, PS3.7
Annex C and PS3.4 Table B.2-1), `federation/status.py` (gRPC code) and `portal/problems.py` (HTTP).

    MissError
    ├── InvalidInput          the request itself is wrong
    │   ├── InvalidInstance       a SOP Instance UID that is no UID
    │   ├── DatasetMismatch       the data set contradicts the command or its SOP class
    │   ├── CannotUnderstand      the data set can't be read
    │   ├── UnsupportedClass      a SOP class that is not taken here
    │   └── InvalidQuery          a key, level or parameter that is not allowed
    ├── NotFound              no such thing, or none that the caller may see
    ├── Gone                  known to be deleted
    ├── OtherContent          another content is here under the UID, and this one is not taken
    ├── Forbidden             the caller may not do this
    ├── NotAuthenticated      the caller has not said who it is
    ├── OutOfResources        disk full, memory budget spent, too many at once: try later
    ├── Unavailable           a part that is needed does not answer: try later
    │   └── Evicted               its bytes were given up here: the region has them
    ├── TooLarge              past a stated bound
    ├── Corrupt               stored bytes do not match their digest
    ├── SyncFailed            the disk did not confirm a write: nothing may be acknowledged
    ├── SchemaTooNew          state written by a newer release
    └── SettingsError         a settings file that can't be used
"""

from __future__ import annotations


class MissError(Exception):
    """The root of what MISS raises on purpose."""


class InvalidInput(MissError):
    """The request itself is wrong."""


class InvalidInstance(InvalidInput):
    """A SOP Instance UID that breaks PS3.5 9.1."""


class DatasetMismatch(InvalidInput):
    """The data set contradicts the command that came with it, or its SOP class."""


class CannotUnderstand(InvalidInput):
    """The data set can't be read."""


class UnsupportedClass(InvalidInput):
    """A SOP class that is not taken here."""


class InvalidQuery(InvalidInput):
    """A key, level or parameter that is not allowed. `keyword` is the attribute that it is about, where it is
    about one."""

    def __init__(self, message: str = "", keyword: str = "") -> None:
        super().__init__(message)
        self.keyword = keyword


class NotFound(MissError):
    """No such thing, or none that the caller may see: the two look the same on purpose."""


class Gone(MissError):
    """Known to be deleted."""


class OtherContent(MissError):
    """Another content is here under the SOP Instance UID, and the device's second ones are not taken."""


class Forbidden(MissError):
    """The caller may not do this."""


class NotAuthenticated(MissError):
    """The caller has not said who it is, or could not prove it."""


class OutOfResources(MissError):
    """Disk full, memory budget spent, too many at once: the caller may try later."""


class Unavailable(MissError):
    """A part that is needed does not answer: the caller may try later."""


class Evicted(Unavailable):
    """The instance is listed here, and its bytes were given up: the region has them."""


EVICTED = "its bytes were given up here; the region has them"


class TooLarge(MissError):
    """Past a stated bound."""


class Corrupt(MissError):
    """Stored bytes do not match their digest or checksum."""


class SyncFailed(MissError):
    """The disk did not confirm a write: nothing that waited for it may be acknowledged."""


class SchemaTooNew(MissError):
    """State written by a newer release of MISS."""


class SettingsError(MissError):
    """A settings file, variable or flag that can't be used."""
