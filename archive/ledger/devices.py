"""The devices that may connect to a node, and the log of who did (PS3.15 A.5.3.7). It admits nobody
itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection as DatabaseConnection
from sqlalchemy import delete, insert, select, update

from archive.ledger.tables import Subject, as_row, connection_log, device, log_key
from archive.model import DEVICE_MAX_AGE_S, DEVICE_SERVICES

CONNECTIONS_MAX = 100_000
_TRIM_ONE_IN = 256
_DEVICE = (
    "SELECT ae_title, address, name, issuer, enabled, port, services, transport, certificate, sop_classes,"
    " transfer_syntaxes, on_conflict, host, reach, on_incomplete, max_age_s FROM device WHERE ae_title = ?"
)


@dataclass(frozen=True, slots=True)
class Device:
    """A modality or workstation. `address` is an IP address, a network in CIDR form, or "*" for any; `issuer`
    overrides the ward's; `port` is where it listens, when it can be called, on `host`, or on `address` where
    that is one machine's and `host` is empty. `services` are of DEVICE_SERVICES.

    `transport` is how it may come: "plain", "tls" or "any"; `certificate` pins the key that it must show over
    TLS (SHA-256 of its SubjectPublicKeyInfo, hex; "" pins none). Empty `sop_classes` and `transfer_syntaxes`
    are all that the node takes; `on_conflict` says what becomes of other content for a UID that is here
    ("keep", "refuse", "propose").

    `reach` is how far it searches and retrieves, one of DEVICE_REACHES; beyond the ward only where the region
    grants it, too. An answer that lacks a ward, or knows one as of more than `max_age_s` seconds ago, ends as
    `on_incomplete` says, one of ON_INCOMPLETE.
    """

    ae_title: str
    address: str
    name: str = ""
    issuer: str | None = None
    enabled: bool = True
    port: int | None = None
    services: frozenset[str] = frozenset(DEVICE_SERVICES)
    transport: str = "any"
    certificate: str = ""
    sop_classes: frozenset[str] = frozenset()
    transfer_syntaxes: frozenset[str] = frozenset()
    on_conflict: str = "keep"
    host: str = ""
    reach: str = "ward"
    on_incomplete: str = "succeed"
    max_age_s: int = DEVICE_MAX_AGE_S

    @property
    def callable_at(self) -> tuple[str, int] | None:
        """Host and port to call it by; None when nobody said where it listens."""
        one_machine = self.address != "*" and "/" not in self.address
        host = self.host or (self.address if one_machine else "")
        return (host, self.port) if host and self.port is not None else None


@dataclass(frozen=True, slots=True)
class Connection:
    """One association, accepted or refused, or a connection that never got so far ("failed"). `contexts` and
    `operations` are JSON; `ended` says how it ended. `certificate` names the one that was shown (subject and
    fingerprint); `times` is how many alike of one address this row stands for. `user_name` is the verified
    user, where the requestor named one."""

    at_us: int
    address: str
    calling_ae: str
    called_ae: str
    device: str = ""
    outcome: str = "accepted"
    reason: str = ""
    contexts: str = "[]"
    operations: str = "{}"
    bytes_in: int = 0
    bytes_out: int = 0
    ended: str = ""
    ended_us: int = 0
    transport: str = "plain"
    certificate: str = ""
    times: int = 1
    user_name: str = ""


class Devices(Subject):
    """The devices of a node."""

    def add_device(self, new: Device) -> None:
        """Add a device, or change the one with the same AE title."""

        def work(connection: DatabaseConnection) -> None:
            row = as_row(new)
            changed = connection.execute(update(device).where(device.c.ae_title == new.ae_title).values(row))
            if not changed.rowcount:
                connection.execute(insert(device).values(row))

        self._database.write(work)

    def devices(self) -> list[Device]:
        rows = self._database.read(lambda c: c.execute(select(device).order_by(device.c.ae_title)).fetchall())
        return [_device(**row._mapping) for row in rows]

    def remove_device(self, ae_title: str) -> bool:
        return self._database.write(
            lambda c: c.execute(delete(device).where(device.c.ae_title == ae_title)).rowcount > 0
        )

    def device(self, ae_title: str) -> Device | None:
        """The device with this AE title; microseconds on SQLite, as every association asks."""
        row = self._database.quick(
            _DEVICE,
            (ae_title.replace("\x00", ""),),
        )
        return None if row is None else _device(*row)


class ConnectionLog(Subject):
    """The last 100,000 associations of a node."""

    def log_connections(self, entries: Sequence[Connection], keys: Sequence[str] = ()) -> list[str]:
        """Write entries in one transaction; their keys. With `keys`, one that is not empty says which row an
        entry takes the place of."""
        given = keys or [""] * len(entries)
        rows = [
            as_row(entry) | {"id": key or log_key(entry.at_us)}
            for entry, key in zip(entries, given, strict=True)
        ]
        former = [key for key in given if key]

        def work(connection: DatabaseConnection) -> None:
            if former:
                connection.execute(delete(connection_log).where(connection_log.c.id.in_(former)))
            if rows:
                connection.execute(insert(connection_log), rows)
            if random.random() * _TRIM_ONE_IN < len(rows):
                oldest_kept = (
                    select(connection_log.c.id)
                    .order_by(connection_log.c.id.desc())
                    .offset(CONNECTIONS_MAX)
                    .limit(1)
                )
                connection.execute(
                    delete(connection_log).where(connection_log.c.id <= oldest_kept.scalar_subquery())
                )

        self._database.write(work)
        return [str(row["id"]) for row in rows]

    def connections(self, limit: int = 100, refused_only: bool = False) -> list[Connection]:
        """The newest associations, newest first; `refused_only` are those that came to nothing."""
        query = select(connection_log).order_by(connection_log.c.id.desc()).limit(limit)
        if refused_only:
            query = query.where(connection_log.c.outcome.in_(("refused", "failed")))
        rows = self._database.read(lambda c: c.execute(query).fetchall())
        return [Connection(**{k: v for k, v in row._mapping.items() if k != "id"}) for row in rows]


def _device(
    ae_title: str,
    address: str,
    name: str,
    issuer: str | None,
    enabled: bool,
    port: int | None,
    services: str,
    transport: str,
    certificate: str,
    sop_classes: str,
    transfer_syntaxes: str,
    on_conflict: str,
    host: str,
    reach: str,
    on_incomplete: str,
    max_age_s: int,
) -> Device:
    return Device(
        ae_title,
        address,
        name,
        issuer,
        bool(enabled),
        port,
        _set(services),
        transport,
        certificate,
        _set(sop_classes),
        _set(transfer_syntaxes),
        on_conflict,
        host,
        reach,
        on_incomplete,
        max_age_s,
    )


def _set(joined: str) -> frozenset[str]:
    return frozenset(filter(None, joined.split(",")))
