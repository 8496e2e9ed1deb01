"""What the first ward of a demo has to do, beside what is sent to it: a step on its worklist, and a rule that
hands studies to the second ward. It starts and sends nothing."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archive.ledger import ScheduledStep

STUDY_UID = "2.25.64655207972239332575259747507314201608"
SECOND_OPINION = """\
# What is described as a second opinion goes on to the ward of another hospital (docs/routing.md).
# The node reads this file again when it changes.
[[rule]]
name = "second opinion"
ward = "{ward}"
match = {{ StudyDescription = "*second opinion*" }}
"""


def rules(ward: str) -> str:
    """The file of routing rules that hands second opinions to `ward`."""
    return SECOND_OPINION.format(ward=ward)


def step(now: datetime) -> ScheduledStep:
    """A CT of an invented person, to be done by any station now; the same step whenever it is scheduled."""
    from archive.dataset.jsonsets import put
    from archive.ledger.worklist import STEP_SEQUENCE, steps_of

    scheduled: dict[str, Any] = {}
    attributes: dict[str, Any] = {STEP_SEQUENCE: {"vr": "SQ", "Value": [scheduled]}}
    description = "CT chest (synthetic)"
    for into, tag, vr, text in (
        (scheduled, "00080060", "CS", "CT"), (scheduled, "00400002", "DA", f"{now:%Y%m%d}"),
        (scheduled, "00400003", "TM", f"{now:%H%M}"), (scheduled, "00400007", "LO", description),
        (scheduled, "00400009", "SH", "DEMO-1"), (attributes, "00080050", "SH", "SYN0401"),
        (attributes, "00100010", "PN", "Synthetic^Dario"), (attributes, "00100020", "LO", "SYN-8"),
        (attributes, "00100030", "DA", "19470214"), (attributes, "00100040", "CS", "M"),
        (attributes, "0020000D", "UI", STUDY_UID), (attributes, "00321060", "LO", description),
        (attributes, "00401001", "SH", "DEMO-1"),
    ):
        put(into, tag, vr, text)
    one, = steps_of(attributes, "demo")
    return one
