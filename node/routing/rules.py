"""Owns what a routing rule means: which instances and studies it takes, and to whom they go. Reads no file
(`rulefile.py`) and sends nothing (`router.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from archive.hours import Hours
from archive.index.described import Described
from archive.ledger import Destination, Routed, RouteKind
from archive.model import InstanceHead
from archive.predicates import Predicate, fits, matches
from federation.deliveries_grants import origin_ward

DAY_US = 86_400 * 1_000_000
RETRY_DAYS = 7.0
RANKS = {"high": 0, "normal": 1, "low": 2}


class When(StrEnum):
    """What sets a rule off. The values are the rule file's words."""

    STORED = "stored"                  # each instance, once it is durable and in the index
    STUDY_COMPLETE = "study complete"  # the whole study, when it is said to be complete


@dataclass(frozen=True, slots=True)
class AttributeIs:
    """An indexed attribute has one of these values, each in DICOM's matching form (PS3.4 C.2.2.2)."""

    keyword: str
    values: tuple[str, ...]
    predicates: tuple[Predicate, ...]

    def holds(self, one: Described) -> bool:
        return any(matches(predicate, one.value_of) for predicate in self.predicates)

    def __str__(self) -> str:
        return f"{self.keyword} is {_either(self.values)}"


@dataclass(frozen=True, slots=True)
class SourceIs:
    """Where an instance came from, or how it is encoded, fits one of these patterns of `*` and `?`; `words`
    is how the file has them."""

    name: str
    values: tuple[str, ...]
    words: tuple[str, ...]

    def holds(self, one: Described) -> bool:
        return self.fits_head(one.stored.head)

    def fits_head(self, head: InstanceHead) -> bool:
        value = SOURCES[self.name](head)
        return any(fits(pattern, value) for pattern in self.values)

    def __str__(self) -> str:
        return f"{self.name} is {_either(self.words)}"


@dataclass(frozen=True, slots=True)
class ReceivedIn:
    """The instance came within a window of hours."""

    hours: Hours

    def holds(self, one: Described) -> bool:
        return self.hours.holds(one.stored.head.provenance.received_at_us)

    def __str__(self) -> str:
        return f"received in {self.hours}"


Condition = AttributeIs | SourceIs | ReceivedIn

SOURCES: dict[str, Callable[[InstanceHead], str]] = {
    "device": lambda head: head.provenance.device,
    "calling_ae": lambda head: head.provenance.calling_ae,
    "sop_class": lambda head: head.sop_class_uid,
    "transfer_syntax": lambda head: head.transfer_syntax_uid,
}


@dataclass(frozen=True, slots=True)
class Rule:
    """What goes where. All of `match` must hold and none of `exclude`; of a study, `match` must hold of one
    of its instances, and `exclude` of none."""

    name: str
    when: When
    to: tuple[Destination, ...]
    match: tuple[Condition, ...] = ()
    exclude: tuple[Condition, ...] = ()
    commit: bool = False
    rank: int = RANKS["normal"]
    delay_s: float = 0.0
    hours: Hours | None = None
    retry_days: float = RETRY_DAYS
    urgent: bool = False  # and the region gets it before everything else

    def takes(self, one: Described) -> bool:
        return all(condition.holds(one) for condition in self.match) and not self._excludes(one)

    def may_take(self, head: InstanceHead) -> bool:
        """False when what is known of an instance without its data set rules it out."""
        return all(condition.fits_head(head) for condition in self.match if isinstance(condition, SourceIs))

    def takes_study(self, instances: Sequence[Described]) -> bool:
        found = any(all(condition.holds(one) for condition in self.match) for one in instances)
        return found and not any(map(self._excludes, instances))

    def _excludes(self, one: Described) -> bool:
        return any(condition.holds(one) for condition in self.exclude)

    def routes_of(self, one: Described, ward: str, now_us: int) -> list[Routed]:
        """The instance on its way to each destination but those that it came from; `ward` is this one."""
        stored = one.stored
        return [
            self._routed(to, stored.study_uid, now_us, stored.series_uid, stored.head.sop_instance_uid,
                         stored.digest)
            for to in self.to
            if to.kind is not RouteKind.NOTICE and not came_from(stored.head, to, ward)
        ]  # fmt: skip

    def notices_of(self, study_uid: str, content: bytes, now_us: int) -> list[Routed]:
        """The notices of a study; `content` is a digest over what it consists of now."""
        return [self._routed(to, study_uid, now_us, "", "", content)
                for to in self.to if to.kind is RouteKind.NOTICE]  # fmt: skip

    def _routed(self, to: Destination, study_uid: str, now_us: int, series_uid: str, sop_instance_uid: str,
                digest: bytes) -> Routed:  # fmt: skip
        due_us = now_us + int(self.delay_s * 1e6)
        return Routed(
            rule=self.name, to=to, study_uid=study_uid, series_uid=series_uid,
            sop_instance_uid=sop_instance_uid, digest=digest, queued_us=now_us,
            next_try_us=due_us if self.hours is None else self.hours.opens_us(due_us),
            expires_us=due_us + int(self.retry_days * DAY_US),
            rank=self.rank, commit=self.commit and to.kind is RouteKind.DEVICE,
        )  # fmt: skip

    def __str__(self) -> str:
        what = "each instance" if self.when is When.STORED else "a study, when it is complete,"
        wheres = []
        if self.match:
            wheres.append(" and ".join(map(str, self.match)))
        if self.exclude:
            wheres.append("not " + " nor ".join(map(str, self.exclude)))
        told = [to.name for to in self.to if to.kind is RouteKind.NOTICE]
        sent = [str(to) for to in self.to if to.kind is not RouteKind.NOTICE]
        acts = [f"is sent to {_both(sent)}"] if sent else []
        acts += [f"is announced to {_both(told)}"] if told else []
        acts += ["goes to the region before everything else"] if self.urgent else []
        how = [f"with {name} priority" for name, rank in RANKS.items() if rank == self.rank != 1]
        how += [f"after {self.delay_s:g} s"] if self.delay_s else []
        how += [f"between {self.hours}"] if self.hours else []
        how += [f"tried for {self.retry_days:g} days"] if self.to else []
        how += ["to be committed there"] if self.commit else []
        where = f" where {', and '.join(wheres)}" if wheres else ""
        return "; ".join(filter(None, (f"{what}{where} {' and '.join(acts)}", ", ".join(how))))


def came_from(head: InstanceHead, to: Destination, ward: str) -> bool:
    """Whether this destination sent the instance: it never gets it back. What another ward delivered goes to
    no ward at all: who acquired an image delivers it to each."""
    is_delivered = origin_ward(head.provenance.device) is not None
    if to.kind is RouteKind.WARD:
        return is_delivered or to.name == ward
    # The calling AE of what was delivered is one of the other ward's machines.
    return not is_delivered and to.name in (head.provenance.device, head.provenance.calling_ae)


def _either(values: Sequence[str]) -> str:
    return " or ".join(values)


def _both(values: Sequence[str]) -> str:
    return " and ".join(values)
