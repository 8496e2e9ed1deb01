"""C-FIND of a server over a real archive, for the tests."""

from __future__ import annotations

from typing import Any

from pydicom.dataset import Dataset

from node.dimse.contexts import EXPLICIT_LITTLE, STUDY_ROOT_FIND
from node.dimse.identifiers import read_identifier, write_identifier
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Requestor
from tests.datasets import make_instance
from tests.node.storing import Storing


def identifier(level: str, **keys: Any) -> Dataset:
    dataset = Dataset()
    dataset.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(dataset, keyword, value)
    return dataset


def find(served: Storing, query: Dataset, *, root: str = STUDY_ROOT_FIND, syntax: str = EXPLICIT_LITTLE,
         cancel_after: int | None = None, extended: bytes = b"") -> tuple[list[int], list[Dataset]]:
    """Every status in order, and the identifiers. `extended` is what is asked for beyond the baseline."""
    asked = [(root, extended)] if extended else []
    with Requestor.connect(served.peer, "CT1", [ProposedContext(1, root, (syntax,))],
                           extended=asked) as requestor:
        answers = list(requestor.find(write_identifier(query, syntax), root, cancel_after=cancel_after))
    return ([answer.status for answer, _ in answers],
            [read_identifier(octets, syntax) for _, octets in answers if octets is not None])


def study(served: Storing, count: int = 1, **elements: Any) -> str:
    """Store a study of one series; its UID."""
    first = make_instance(number=1, **elements)
    rest = [make_instance(number=n, study_uid=first.study_uid, series_uid=first.series_uid, **elements)
            for n in range(2, count + 1)]
    assert served.send(first, *rest) == [0] * count
    return first.study_uid
