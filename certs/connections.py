"""The connections of the enrolment port, which anybody may open: one that asks for nothing gives way to one
that does, and none is held open for long. It knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

SILENT_MAX = 32             # connections without a request: past it the oldest gives way to the newest
CONNECTION_S_MAX = 30.0     # of one connection in all; a reply that was lost is asked for again


def bounded_protocol() -> type[H11Protocol]:
    """uvicorn's protocol, which itself waits for a request as long as the peer likes and counts the
    connection against its limit all the while. Each server has a class of its own, and so its own count."""
    silent: dict[H11Protocol, None] = {}  # in order of arrival

    class Bounded(H11Protocol):
        _end: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._end = self.loop.call_later(CONNECTION_S_MAX, transport.abort)
            silent[self] = None
            if len(silent) > SILENT_MAX:
                oldest = next(iter(silent))
                del silent[oldest]
                oldest.transport.abort()

        def handle_events(self) -> None:
            super().handle_events()
            if self.cycle is not None:
                silent.pop(self, None)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._end is not None:
                self._end.cancel()
            silent.pop(self, None)
            super().connection_lost(exc)

    return Bounded
