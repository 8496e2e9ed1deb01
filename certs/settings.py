"""The settings of this package, as sections of the processes that use it."""

from __future__ import annotations

from dataclasses import dataclass

from archive.settings import setting
from certs.profiles import LEAF_LIFE_S


@dataclass(frozen=True)
class EnrolmentSettings:
    """The hub's enrolment port."""

    host: str = setting("0.0.0.0", "Address the enrolment port listens on.")
    port: int = setting(7444, "Enrolment port; 0 takes a free one.", minimum=0, maximum=65535)
    hub_addresses: list[str] = setting(
        [], "The hub's gRPC addresses, host:port, as wards and portals reach them; told to who enrols.")
    certificate_life_s: int = setting(
        LEAF_LIFE_S, "Life of a member's certificate: at least three times the longest planned outage.", "s",
        minimum=10)
