"""What a ward decided and the region did not take, with its reason: rows of the node's audit log, which
commands show to the ward's people."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from archive.ledger import AuditRow
from archive.model import Fact

ACT = "decision-refused"
REGION = "region"


@dataclass(frozen=True, slots=True)
class Refused:
    """A decision that stands at the ward alone. `decision` is the id of the correction or the removal."""

    kind: str
    decision: str
    uid: str
    reason: str
    at_us: int


def refusals_to(audit: Callable[[AuditRow], None]) -> Callable[[Fact, str], None]:
    """What keeps a refusal in an audit log."""

    def keep(fact: Fact, reason: str) -> None:
        subject = {"kind": fact.kind.value, "decision": decision_of(fact), "uid": fact.sop_instance_uid,
                   "reason": reason}  # fmt: skip
        audit(AuditRow(fact.at_us, REGION, ward=fact.ward, act=ACT, subject=json.dumps(subject),
                       outcome="failure"))  # fmt: skip

    return keep


def refused_of(rows: Sequence[AuditRow]) -> list[Refused]:
    """Rows of that act, as they were kept."""
    found = []
    for row in rows:
        try:
            body = json.loads(row.subject)
            found.append(Refused(body["kind"], body["decision"], body["uid"], body["reason"], row.at_us))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def decision_of(fact: Fact) -> str:
    """The id that the decision has, or that it takes back."""
    try:
        body = json.loads(fact.detail)
        return str(body.get("undo") or body.get("id", ""))
    except (ValueError, AttributeError):
        return ""
