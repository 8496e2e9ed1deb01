"""Which ward may hand images to which: the region's pairs, and whom a node takes from; and the name that says
where a delivered instance came from. Words of settings and records alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from archive.errors import Forbidden, SettingsError

EVERY = "*"

_WARD = re.compile(r"[a-z0-9-]+/[a-z0-9-]+", re.ASCII)
_ORIGIN = "ward:"


@dataclass(frozen=True, slots=True)
class DeliveryGrants:
    """The region's: which pairs (from, to) of wards may deliver, `*` for every ward."""

    pairs: frozenset[tuple[str, str]]

    @classmethod
    def of(cls, words: Sequence[str]) -> DeliveryGrants:
        """Of the setting `deliveries`, each "FROM > TO". Raises SettingsError."""
        pairs = set()
        for word in words:
            source, arrow, target = (part.strip() for part in word.partition(">"))
            if not (arrow and _is_ward(source) and _is_ward(target)):
                raise SettingsError(f'deliveries: {word!r} is not "FROM > TO" of wards or "{EVERY}"')
            pairs.add((source, target))
        return cls(frozenset(pairs))

    def allows(self, from_ward: str, to_ward: str) -> bool:
        """Whether the one may hand over to the other."""
        asked = {(source, target) for source in (from_ward, EVERY) for target in (to_ward, EVERY)}
        return bool(asked & self.pairs)

    def require(self, from_ward: str, to_ward: str) -> None:
        """Raises Forbidden unless the one may hand over to the other."""
        if not self.allows(from_ward, to_ward):
            raise Forbidden(f"the region does not let {from_ward} deliver to {to_ward}")


@dataclass(frozen=True, slots=True)
class Accepted:
    """A node's: the wards whose deliveries it takes."""

    wards: frozenset[str]

    @classmethod
    def of(cls, words: Sequence[str]) -> Accepted:
        """Of the setting `deliveries.accept_from`. Raises SettingsError."""
        for word in words:
            if not _is_ward(word):
                raise SettingsError(f'deliveries.accept_from: {word!r} is neither a ward nor "{EVERY}"')
        return cls(frozenset(words))

    def takes_from(self, ward: str) -> bool:
        return ward in self.wards or EVERY in self.wards


def origin_device(ward: str) -> str:
    """The device, in the provenance, of what `ward` delivered: no AE title of a ward's machine is like it."""
    return f"{_ORIGIN}{ward}"


def origin_ward(device: str) -> str | None:
    """The ward that delivered what has this device in its provenance; None of what a machine sent."""
    ward = device.removeprefix(_ORIGIN)
    return ward if ward != device and _WARD.fullmatch(ward) else None


def _is_ward(word: str) -> bool:
    return word == EVERY or _WARD.fullmatch(word) is not None
