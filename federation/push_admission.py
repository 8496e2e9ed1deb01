"""Which push streams the hub takes: so many in all, and of one ward. When all places are taken, a ward that
has less than its share gets one all the same, and the ward that has the most gives one up: that stream ends
after what has been read of it, with its receipts, and its node offers the rest anew. So wards that came first
can't keep the others out. Lives in the hub's event loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from archive.errors import OutOfResources


@dataclass(eq=False, slots=True)
class Place:
    """A push stream's place. The stream is to end once `given_up`, and is told by `wake`."""

    ward: str
    given_up: bool = False
    wake: Callable[[], None] = lambda: None

    def give_up(self) -> None:
        self.given_up = True
        self.wake()


class PushAdmission:
    """See the module's docstring. At most twice `places` streams run, half of them about to end."""

    def __init__(self, places: int, per_ward: int) -> None:
        self._places = places
        self._per_ward = per_ward
        self._taken: dict[str, list[Place]] = {}
        self._ending: set[Place] = set()

    def enter(self, ward: str) -> Place:
        """A place for one more stream of this ward; OutOfResources when it is to come later."""
        own, total = len(self._taken.get(ward, ())), sum(map(len, self._taken.values()))
        if own >= self._per_ward:
            raise OutOfResources("too many pushes at once of this ward")
        if total >= self._places:
            self._make_room(ward, own)
        place = Place(ward)
        self._taken.setdefault(ward, []).append(place)
        return place

    def leave(self, place: Place) -> None:
        self._ending.discard(place)
        self._drop(place)

    def end_all(self) -> None:
        """The hub stops."""
        for places in self._taken.values():
            for place in places:
                place.give_up()

    def _make_room(self, ward: str, own: int) -> None:
        largest = max(self._taken, key=lambda other: len(self._taken[other]))
        share = self._places // len(self._taken.keys() | {ward})
        if own >= max(share, 1) or len(self._taken[largest]) <= own + 1 or len(self._ending) >= self._places:
            raise OutOfResources("too many pushes at once")
        place = self._taken[largest][-1]
        self._drop(place)
        self._ending.add(place)
        place.give_up()

    def _drop(self, place: Place) -> None:
        places = self._taken.get(place.ward, [])
        if place in places:
            places.remove(place)
        if not places:
            self._taken.pop(place.ward, None)
