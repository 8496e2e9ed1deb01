"""Up to which receipt the region's nodes may evict (`protected_to`), by the region's rule. A node that evicts
relies on the region alone: what the region could lose, by being restored from its backup, a ward has to have
still. So what counts is not that the region has an instance, but that what it would be restored from has it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from archive.errors import MissError
from archive.ledger import Ledger
from federation.pools import Pools
from federation.settings import ProtectionSettings

log = logging.getLogger(__name__)

ASK_S = 10.0
_SECOND_US, _MINUTE_US = 1_000_000, 60 * 1_000_000  # what moves on by itself is told in steps


class Protection:
    """The value that the hub tells its nodes, asked for in its event loop and often: so the ledger is read
    beside that, by `watch`."""

    def __init__(self, ledger: Ledger, settings: ProtectionSettings, clock: Callable[[], int]) -> None:
        self._ledger = ledger
        self._settings = settings
        self._clock = clock
        self._backup_us = 0

    async def watch(self, pools: Pools) -> None:
        """Sees which backups are declared, until it is cancelled. A ledger that does not answer changes
        nothing."""
        while self._settings.by == "backup":
            try:
                last = await pools.ledger(self._ledger.last_backup)
            except MissError as error:
                log.warning("which backups were declared can't be read: %s", error)
            else:
                self._backup_us = 0 if last is None else last.as_of_us
            await asyncio.sleep(ASK_S)

    def protected_to_us(self) -> int:
        """What has a receipt of this time or older may be evicted; 0: nothing."""
        if self._settings.by == "backup":
            return min(self._backup_us, self._clock())
        age_us = int(self._settings.hours * 3600e6)
        step_us = max(_SECOND_US, min(_MINUTE_US, age_us // 10))
        return max(0, (self._clock() - age_us) // step_us * step_us)
