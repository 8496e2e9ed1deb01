"""Who in the hub waits for which instance to arrive. Lives in the event loop; knows UIDs and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable


class Arrivals:
    """An instance arrives when its receipt is given, or when it was refused: then nobody waits for it any
    more.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._told: list[Callable[[Iterable[str]], None]] = []

    def tell(self, hear: Callable[[Iterable[str]], None]) -> None:
        """`hear` is called with whatever arrives."""
        self._told.append(hear)

    def expect(self, uid: str) -> asyncio.Future[None]:
        """Done when the instance arrives. Look whether it is there already after this, not before."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(uid, set()).add(future)
        return future

    def is_awaited(self, uids: Iterable[str]) -> bool:
        """Whether anybody waits for one of these."""
        return bool(self._waiting) and any(uid in self._waiting for uid in uids)

    def forget(self, uid: str, future: asyncio.Future[None]) -> None:
        waiting = self._waiting.get(uid, set())
        waiting.discard(future)
        if not waiting:
            self._waiting.pop(uid, None)

    def came(self, uids: Iterable[str]) -> None:
        """These have arrived."""
        uids = list(uids)
        for hear in self._told:
            hear(uids)
        for uid in uids:
            for future in self._waiting.pop(uid, ()):
                if not future.done():
                    future.set_result(None)

    @property
    def waiting(self) -> int:
        return len(self._waiting)
