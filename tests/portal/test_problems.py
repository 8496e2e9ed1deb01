"""The table from errors to HTTP is complete, and what is hidden looks like what is not there."""

from __future__ import annotations

from collections.abc import Iterator

from archive import errors
from archive.errors import Forbidden, MissError, NotFound, Unavailable
from portal.negotiate import NotAcceptable
from portal.problems import STATUSES, from_error, status_of


def classes(root: type[MissError]) -> Iterator[type[MissError]]:
    yield root
    for below in root.__subclasses__():
        yield from classes(below)


def test_every_class_has_its_own_row() -> None:
    of_the_tree = {found for found in classes(MissError) if found.__module__ == errors.__name__}
    assert of_the_tree == set(STATUSES)


def test_a_class_that_the_table_does_not_know_answers_as_its_nearest() -> None:
    class Special(NotFound):
        pass

    assert status_of(Special("x")) == 404


def test_answers() -> None:
    assert from_error(NotFound("study 1.2.3 is hidden")).body == from_error(NotFound("no such file")).body
    assert from_error(Unavailable("later")).headers["Retry-After"]
    assert from_error(NotAcceptable("x")).status_code == 406
    assert from_error(Forbidden("x")).status_code == 403
    unexpected = from_error(RuntimeError("Rossi^Maria"))
    assert unexpected.status_code == 500 and b"Rossi" not in unexpected.body
