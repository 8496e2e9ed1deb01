"""What a node keeps on its disk. `policy.py` says which studies go and which stay, `rules.py` reads what the
ward lays down of that, `room.py` makes room, `bringing.py` gets back what was wanted, `prefetching.py` what
tomorrow's patients will need; `archive/uses.py` remembers when each study was last wanted. `Cache` is all of
them.

It gives nothing up itself: `archive/space/eviction.py` does, and never what the region does not have.
"""

from __future__ import annotations

from node.cache.cache import Cache

__all__ = ["Cache"]
