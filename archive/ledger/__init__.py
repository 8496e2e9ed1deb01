"""The ledger: the database of what is nobody's derivative. It is never rebuilt, so it is always fully
synced.

Each module owns one subject: its tables, its frozen rows and the questions about them. `Ledger` is all of
them over one database (SQLite or PostgreSQL), and several processes may have it open. Every write is one
transaction. It holds no images and no indexed attributes.
"""

from __future__ import annotations

from archive.database import Database
from archive.ledger.audit import AuditLog, AuditRow
from archive.ledger.certificates import CertificateRegister, CertificateRow
from archive.ledger.commitments import Commitment, CommitmentItem, Commitments
from archive.ledger.completions import Completions, StudyCompletion
from archive.ledger.deliveries import Delivery, DeliveryBook, DeliveryKey, DeliveryStanding, DeliveryState
from archive.ledger.devices import Connection, ConnectionLog, Device, Devices
from archive.ledger.invites import Binding, Invite, Invites
from archive.ledger.keeping import DeclaredBackup, Keeping, Pin
from archive.ledger.orders import Order, Orders
from archive.ledger.performed import PerformedStep, PerformedSteps, StepReference
from archive.ledger.routes import (
    CompleteStudy,
    Destination,
    DestinationState,
    RouteChoice,
    Routed,
    RouteKind,
    Routes,
    RouteState,
    RouteSummary,
    RuleMark,
    Settlement,
)
from archive.ledger.tables import STEPS
from archive.ledger.users import Session, Throttle, User, Users
from archive.ledger.wards import Wards, WardState
from archive.ledger.worklist import ScheduledStep, StepSearch, Worklist

__all__ = [
    "AuditRow",
    "Binding",
    "CertificateRow",
    "CompleteStudy",
    "Commitment",
    "CommitmentItem",
    "Connection",
    "DeclaredBackup",
    "Delivery",
    "DeliveryKey",
    "DeliveryStanding",
    "DeliveryState",
    "Destination",
    "DestinationState",
    "Device",
    "Invite",
    "Ledger",
    "Order",
    "Pin",
    "RouteChoice",
    "RouteKind",
    "RouteState",
    "RouteSummary",
    "Routed",
    "RuleMark",
    "PerformedStep",
    "ScheduledStep",
    "Session",
    "Settlement",
    "StepReference",
    "StepSearch",
    "StudyCompletion",
    "Throttle",
    "User",
    "WardState",
]


class Ledger(
    Wards, Devices, ConnectionLog, Users, CertificateRegister, Invites, AuditLog, Orders, Routes,
    DeliveryBook, Commitments, Worklist, PerformedSteps, Completions, Keeping,
):
    """An open ledger."""

    @classmethod
    def open(cls, url: str) -> Ledger:
        """Open the ledger at `url`, making its tables when there are none."""
        return cls(Database(url, name="ledger", steps=STEPS, durable=True))

    def close(self) -> None:
        self._database.close()
