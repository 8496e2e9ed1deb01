"""Large objects that are being received, for those who read them while they arrive. Whoever receives says
when one begins; a reader reads what is on disk of it, at its own pace, so that a slow one slows nobody. What
gathers in memory is not here: it is stored before a reader could have begun.

What is read here is not verified. `federation/passing.py` holds the last of it until it is.
"""

from __future__ import annotations

import threading
from typing import Protocol

from archive.model import Scope
from archive.packs.growing import Growing


class Receiving(Protocol):
    """An object on its way in (`archive/reception.py`)."""

    @property
    def ended(self) -> bool: ...

    def read_beside(self) -> Growing | None: ...


class Taps:
    """The receptions that are open, by SOP Instance UID; as many as there are push streams. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, list[tuple[str, Receiving]]] = {}

    def begin(self, ward: str, uid: str, reception: Receiving) -> None:
        """This ward sends it from here on."""
        with self._lock:
            self._forget_ended()
            self._open.setdefault(uid, []).append((ward, reception))

    def read_beside(self, uid: str, scope: Scope) -> Growing | None:
        """The instance as a ward in the scope sends it now; None when none does, or when it is small. The
        caller closes it."""
        for reception in self._of(uid, scope):
            try:
                growing = reception.read_beside()
            except OSError:  # it has just been stored
                continue
            if growing is not None:
                return growing
        return None

    def is_open(self, uid: str, scope: Scope) -> bool:
        """Whether a ward in the scope sends it now."""
        return bool(self._of(uid, scope))

    def _of(self, uid: str, scope: Scope) -> list[Receiving]:
        with self._lock:
            return [
                reception
                for ward, reception in self._open.get(uid, ())
                if scope.allows(ward) and not reception.ended
            ]

    def _forget_ended(self) -> None:
        for uid, receptions in list(self._open.items()):
            left = [one for one in receptions if not one[1].ended]
            if left:
                self._open[uid] = left
            else:
                del self._open[uid]
