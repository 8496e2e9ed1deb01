"""How long a ward is waited for, by how it answered lately. A state machine for each attachment, without a
clock and without I/O.

    TRUSTED  waited for until the deadline
       |  MISSES_MAX answers in a row did not come in time
       v
    SHORT    waited for LEASH_S alone. Its question stays open behind the answer, until the deadline, one at
       |     a time
       |  one answer came, be it to a question that stayed open
       v
    TRUSTED

So a ward that hangs costs the searches after the second no more than the leash, whoever asked names it in the
coverage each time, and nobody pays for finding out that it is back. A ward that answers, slowly but within
the deadline, is back on trust by its own answer. A new attachment begins with trust.
"""

from __future__ import annotations

from dataclasses import dataclass

MISSES_MAX = 2
LEASH_S = 0.25


@dataclass(slots=True)
class Leash:
    """One attachment's standing."""

    misses: int = 0
    probing: bool = False  # a question stays open behind the answer

    @property
    def is_short(self) -> bool:
        return self.misses >= MISSES_MAX

    def wait_s(self, deadline_s: float) -> float:
        """How long an answer is held up for this ward."""
        return min(deadline_s, LEASH_S) if self.is_short else deadline_s

    def answered(self) -> None:
        """An answer came, or a word that there is none: it hears."""
        self.misses = 0

    def missed(self) -> None:
        """An answer did not come in time."""
        self.misses = min(self.misses + 1, MISSES_MAX)
