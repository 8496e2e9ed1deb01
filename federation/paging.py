"""Messages in pages of a bounded size: how what is listed goes over the wire, whoever lists it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from google.protobuf.message import Message

PAGE_BYTES = 256 << 10

M = TypeVar("M", bound=Message)


def pages_of(messages: Iterable[M], bytes_max: int = PAGE_BYTES) -> Iterator[list[M]]:
    """The messages in groups of a bounded size, in order; none when there are none. One that is larger than a
    page is a page of its own."""
    page: list[M] = []
    size = 0
    for message in messages:
        if page and size + message.ByteSize() > bytes_max:
            yield page
            page, size = [], 0
        page.append(message)
        size += message.ByteSize()
    if page:
        yield page
