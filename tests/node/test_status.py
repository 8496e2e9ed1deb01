"""The table of statuses is complete and in the standard's ranges."""

from __future__ import annotations

import pytest
from pynetdicom.status import STORAGE_SERVICE_CLASS_STATUS

from archive import errors
from node.dimse import status
from node.dimse.errors import AssociationEnded
from node.dimse.services import store

EVERY_ERROR = [cls for cls in vars(errors).values()
               if isinstance(cls, type) and issubclass(cls, errors.MissError)]


def test_every_error_has_a_status() -> None:
    assert set(status.STATUS) == set(EVERY_ERROR)


@pytest.mark.parametrize("cls", EVERY_ERROR)
def test_every_status_is_a_failure_of_the_storage_service(cls: type[errors.MissError]) -> None:
    code = status.status_of(cls("x"))
    assert STORAGE_SERVICE_CLASS_STATUS.get(code, ("Failure", ""))[0] == "Failure"
    assert code == status.STATUS[cls]
    assert not status.is_stored(code)


def test_a_subclass_is_answered_as_its_parent() -> None:
    assert status.status_of(AssociationEnded("x")) == status.OUT_OF_RESOURCES


@pytest.mark.parametrize(("error", "code"), [
    (errors.InvalidInstance, 0x0117), (errors.DatasetMismatch, 0xA900), (errors.CannotUnderstand, 0xC000),
    (errors.OutOfResources, 0xA700), (errors.UnsupportedClass, 0x0122), (errors.Forbidden, 0x0124),
    (errors.MissError, 0x0110), (errors.SyncFailed, 0xA700), (errors.InvalidQuery, 0xA900),
])
def test_the_standards_own_words(error: type[errors.MissError], code: int) -> None:
    assert status.status_of(error("x")) == code


def test_warnings_mean_stored() -> None:
    assert all(status.is_stored(code) for code in (0x0000, 0xB000, 0xB006, 0xB007))
    assert not any(status.is_stored(code) for code in (0x0110, 0xA700, 0xA900, 0xC000, 0xFE00))


def test_statuses_have_words() -> None:
    assert status.meaning(0xA7AB) == "out of resources"
    assert status.meaning(0xC123) == "cannot understand"
    assert status.meaning(0x1234) == "an unknown status"


def test_what_a_store_answers_is_said() -> None:
    """The conformance statement's table of C-STORE: every status that an error of intake becomes."""
    answered = set(status.STATUS.values()) - {status.NO_SUCH_INSTANCE}  # which is of reading alone
    assert set(store.STATUSES) == answered | {status.SUCCESS}
