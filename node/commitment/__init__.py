"""Storage commitment (PS3.4 Annex J): the promise that an instance is kept, given only for bytes that were
read from the disk and hashed again.

`desk.py` keeps requests and says who may send a report, `verifier.py` decides on every instance,
`couriers.py` and `reporter.py` bring reports to devices until they are heard, `scu.py` asks others for the
same promise on what was forwarded. `StorageCommitment` is all of them. What a message looks like is
`node/dimse/`'s.
"""

from __future__ import annotations

from node.commitment.commitment import StorageCommitment
from node.commitment.scu import CommitmentResult, CommitmentScu

__all__ = ["CommitmentResult", "CommitmentScu", "StorageCommitment"]
