"""What a reader is told of a study that is not whole in the region: which instances wards hold alone, and
which of those have arrived since. Domain objects, shared by portal, hub and node; nothing here asks anybody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

from archive.errors import Unavailable
from archive.model import StoredInstance
from federation.coverage import WardCoverage

LISTED_MAX = 20_000  # instances of one study that one ward holds alone; of more, readers wait for the others


@dataclass(frozen=True, slots=True)
class Held:
    """An instance that one ward holds alone. Its location has a length, and no place."""

    ward: str
    instance: StoredInstance


class Coming:
    """What wards hold alone of a study, on its way. Waited for by threads; told by whoever hears of it.

    `listed` and `coverage` are as of when the wards were asked; `complete` says that each answered in full.
    """

    def __init__(
        self, listed: Sequence[Held] = (), *, complete: bool = True, coverage: Sequence[WardCoverage] = ()
    ) -> None:
        self.listed = tuple(listed)
        self.complete = complete
        self.coverage = list(coverage)
        self._changed = threading.Condition()
        self._arrived: set[str] = set()
        self._over = not listed
        self._failure = ""

    @property
    def over(self) -> bool:
        """Whether nothing more is to be heard."""
        return self._over

    def arrived(self, uids: Iterable[str]) -> None:
        with self._changed:
            self._arrived.update(uids)
            self._changed.notify_all()

    def end(self, failure: str = "") -> None:
        """Nothing more is heard: all has arrived, or `failure` says why not."""
        with self._changed:
            self._over, self._failure = True, failure
            self._changed.notify_all()

    def wait(self, uid: str, wait_s: float) -> None:
        """Until this instance has arrived. Unavailable when it does not."""
        until_s = time.monotonic() + wait_s
        with self._changed:
            while uid not in self._arrived:
                if self._over:
                    raise Unavailable(self._failure or "it did not arrive")
                if not self._changed.wait(until_s - time.monotonic()):
                    raise Unavailable("it did not arrive in time")


@dataclass(frozen=True, slots=True, kw_only=True)
class Awaited(StoredInstance):
    """An instance that a ward holds alone and that a reader is given all the same: `Source.arrived` waits for
    it, `Source.passing` reads it while it arrives."""

    coming: Coming = field(compare=False, hash=False, repr=False)


def awaited(instance: StoredInstance, coming: Coming) -> Awaited:
    values = {one.name: getattr(instance, one.name) for one in fields(StoredInstance)}
    return Awaited(**values, coming=coming)


class Found(list[StoredInstance]):
    """The instances to read. `lacking` says in plain words what of them can't be had now, "" when all can:
    a ward that is known to hold part of the study did not answer, say."""

    def __init__(self, instances: Iterable[StoredInstance] = (), *, lacking: str = "") -> None:
        super().__init__(instances)
        self.lacking = lacking
