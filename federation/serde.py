"""The one place where protobuf messages and domain objects turn into each other. It checks what comes in,
since it came from another process: a level, state or role that this release does not know is an error of
ours, a number past its bound too. It never decides anything.

Absent fields read as before they existed (protobuf's zero values), so that releases that differ by one
understand each other.
"""

from __future__ import annotations

from archive.errors import InvalidInput, InvalidQuery
from archive.ledger import Delivery, DeliveryKey, DeliveryStanding
from archive.model import (
    Fields,
    InstanceHead,
    Level,
    Match,
    Outcome,
    PatientKey,
    Position,
    Provenance,
    Query,
    Rules,
    Scope,
    SeriesHolding,
    StudyPlace,
    require_uid,
)
from archive.offsets import is_offset
from federation.assertion import Assertion
from federation.coverage import CoverageState, Report, WardCoverage, WardStatus
from federation.line import RegionPolicy
from federation.replicator import Received, Refused, Verdict
from protos import common_pb2, delivery_pb2, region_pb2, uplink_pb2

DIGEST_BYTES = 32
KEYS_MAX = 256
WARDS_MAX = 10_000
CLOCK_US_MAX = 1 << 60
WORD_CHARS_MAX = 256  # of an issuer, of an AE title, of a hub's address
NAME_BYTES_MAX = 64  # of a store, of a hub
HUBS_MAX = 8  # a node attaches to no more of them


def fields_to(fields: Fields) -> common_pb2.Fields:
    return common_pb2.Fields(values=dict(fields))


def fields_from(message: common_pb2.Fields) -> Fields:
    return dict(message.values)


def head_to(head: InstanceHead) -> common_pb2.InstanceHead:
    origin = head.provenance
    return common_pb2.InstanceHead(
        sop_class_uid=head.sop_class_uid,
        sop_instance_uid=head.sop_instance_uid,
        transfer_syntax_uid=head.transfer_syntax_uid,
        ward=origin.ward,
        issuer=origin.issuer,
        device=origin.device,
        calling_ae=origin.calling_ae,
        received_at_us=origin.received_at_us,
    )


def head_from(message: common_pb2.InstanceHead, *, ward: str) -> InstanceHead:
    """The head with `ward` as the holder, whatever the message says: a node speaks for its own ward."""
    origin = Provenance(ward, message.issuer, message.device, message.calling_ae, message.received_at_us)
    return InstanceHead(
        require_uid(message.sop_class_uid, "a SOP Class UID"),
        require_uid(message.sop_instance_uid, "a SOP Instance UID"),
        require_uid(message.transfer_syntax_uid, "a Transfer Syntax UID"),
        origin,
    )


def query_to(query: Query) -> common_pb2.Query:
    return common_pb2.Query(
        level=query.level.value,
        keys=[common_pb2.Key(keyword=keyword, value=value) for keyword, value in query.keys],
        every_ward=query.scope.wards is None,
        wards=sorted(query.scope.wards or ()),
        bound_to_person=query.person is not None,
        person=[common_pb2.PatientKey(issuer=p.issuer, patient_id=p.patient_id) for p in query.person or ()],
        combine_datetime=query.combine_datetime,
        rules=common_pb2.Rules(
            fuzzy_names=query.rules.fuzzy_names,
            empty_values=query.rules.empty_values,
            multiple_values=query.rules.multiple_values,
            timezone=query.rules.timezone,
        ),
        limit=query.limit or 0,
        offset=query.offset,
        pending_only=query.pending_only,
        after=common_pb2.StudyPlace(date=query.after.date, time=query.after.time, uid=query.after.uid)
        if query.after is not None
        else None,
    )


def query_from(message: common_pb2.Query) -> Query:
    if (
        len(message.keys) > KEYS_MAX
        or len(message.wards) > WARDS_MAX
        or message.limit < 0
        or message.offset < 0
    ):
        raise InvalidQuery("a query past its bounds")
    person = frozenset(PatientKey(key.issuer, key.patient_id) for key in message.person)
    return Query(
        level=_level(message.level),
        keys=tuple((key.keyword, key.value) for key in message.keys),
        scope=Scope(None if message.every_ward else frozenset(message.wards)),
        person=person if message.bound_to_person else None,
        combine_datetime=message.combine_datetime,
        rules=_rules(message.rules),
        pending_only=message.pending_only,
        limit=message.limit or None,
        offset=message.offset,
        after=_place(message.after) if message.HasField("after") else None,
    )


def _place(message: common_pb2.StudyPlace) -> StudyPlace:
    if len(message.date) > WORD_CHARS_MAX or len(message.time) > WORD_CHARS_MAX:
        raise InvalidQuery("a query past its bounds")
    return StudyPlace(message.date, message.time, require_uid(message.uid, "a Study Instance UID"))


def _rules(message: common_pb2.Rules) -> Rules:
    if message.timezone and not is_offset(message.timezone):
        raise InvalidQuery("an offset from UTC is written &ZZXX")
    return Rules(message.fuzzy_names, message.empty_values, message.multiple_values, message.timezone)


def match_to(match: Match) -> common_pb2.Match:
    return common_pb2.Match(
        level=match.level.value,
        issuer=match.issuer,
        patient=fields_to(match.patient),
        study=fields_to(match.study),
        series=fields_to(match.series),
        instance=fields_to(match.instance),
        modalities=match.modalities,
        sop_classes=match.sop_classes,
        series_count=match.series_count,
        instance_count=match.instance_count,
        study_count=match.study_count,
        wards=match.wards,
        holdings=[
            common_pb2.SeriesHolding(
                series_uid=h.series_uid, modality=h.modality, sop_instance_uids=h.sop_instance_uids
            )
            for h in match.holdings
        ],
        truncated=match.truncated,
        pending_at=match.pending_at,
        nearline=match.nearline,
    )


def match_from(message: common_pb2.Match) -> Match:
    return Match(
        level=_level(message.level),
        issuer=message.issuer,
        patient=fields_from(message.patient),
        study=fields_from(message.study),
        series=fields_from(message.series),
        instance=fields_from(message.instance),
        modalities=tuple(message.modalities),
        sop_classes=tuple(message.sop_classes),
        series_count=message.series_count,
        instance_count=message.instance_count,
        study_count=message.study_count,
        wards=tuple(message.wards),
        holdings=tuple(
            SeriesHolding(h.series_uid, h.modality, tuple(h.sop_instance_uids)) for h in message.holdings
        ),
        truncated=message.truncated,
        pending_at=tuple(message.pending_at),
        nearline=message.nearline,
    )


def match_of_ward(message: common_pb2.Match, ward: str) -> Match:
    """A ward's row of an answer, held by that ward and no other, and complete enough to be merged."""
    match = match_from(message)
    require_uid(match.study.get("StudyInstanceUID", ""), "a Study Instance UID")
    if match.level in (Level.SERIES, Level.IMAGE):
        require_uid(match.series.get("SeriesInstanceUID", ""), "a Series Instance UID")
    if match.level is Level.IMAGE:
        require_uid(match.instance.get("SOPInstanceUID", ""), "a SOP Instance UID")
    return Match(**{name: getattr(match, name) for name in match.__slots__ if name != "wards"}, wards=(ward,))


def coverage_to(coverage: WardCoverage) -> common_pb2.WardCoverage:
    return common_pb2.WardCoverage(
        ward=coverage.ward,
        hospital=coverage.hospital,
        name=coverage.name,
        state=coverage.state.value,
        complete_to_us=coverage.complete_to_us or 0,
        pending=coverage.pending,
        set_aside=coverage.set_aside,
        seen_at_us=coverage.seen_at_us or 0,
        reason=coverage.reason,
    )


def coverage_from(message: common_pb2.WardCoverage) -> WardCoverage:
    return WardCoverage(
        ward=message.ward,
        hospital=message.hospital,
        name=message.name,
        state=_state(message.state),
        complete_to_us=message.complete_to_us or None,
        pending=message.pending,
        set_aside=message.set_aside,
        seen_at_us=message.seen_at_us or None,
        reason=message.reason,
    )


def report_to(report: Report) -> uplink_pb2.WardReport:
    return uplink_pb2.WardReport(
        pending=report.pending,
        pending_bytes=report.pending_bytes,
        oldest_pending_us=report.oldest_pending_us or 0,
        set_aside=report.set_aside,
        conflicts=report.conflicts,
        instances=report.instances,
        free_bytes=report.free_bytes,
        clock_us=report.clock_us,
        certificate_not_after_us=report.certificate_not_after_us,
        rate_bytes_per_s=report.rate_bytes_per_s,
        ae_title=report.ae_title,
        hold=report.hold,
        evicted=report.evicted,
        damaged=report.damaged,
        bytes=report.bytes,
        wire_ratio=report.wire_ratio,
        as_of_us=report.as_of_us,
    )


def report_from(message: uplink_pb2.WardReport) -> Report:
    if min(message.pending, message.pending_bytes, message.set_aside) < 0:
        raise InvalidInput("a report with a negative count")
    # Or its skew would fit no message and no column.
    if not 0 <= message.clock_us <= CLOCK_US_MAX or not 0 <= message.as_of_us <= CLOCK_US_MAX:
        raise InvalidInput("a report with an impossible clock")
    return Report(
        pending=message.pending,
        pending_bytes=message.pending_bytes,
        oldest_pending_us=message.oldest_pending_us or None,
        set_aside=message.set_aside,
        conflicts=message.conflicts,
        instances=message.instances,
        free_bytes=message.free_bytes,
        clock_us=message.clock_us,
        certificate_not_after_us=message.certificate_not_after_us,
        rate_bytes_per_s=message.rate_bytes_per_s,
        ae_title=message.ae_title[:16],
        hold=message.hold,
        evicted=message.evicted,
        damaged=message.damaged,
        bytes=message.bytes,
        wire_ratio=message.wire_ratio if 0 <= message.wire_ratio < float("inf") else 0.0,
        as_of_us=message.as_of_us,
    )


def policy_to(policy: RegionPolicy) -> uplink_pb2.Policy:
    return uplink_pb2.Policy(
        clock_us=policy.clock_us,
        protected_to_us=policy.protected_to_us,
        hub_addresses=policy.hub_addresses,
        standby=policy.standby,
        store=policy.store,
        store_file=policy.store_position.file,
        store_offset=policy.store_position.offset,
        hub=policy.hub,
    )


def policy_from(message: uplink_pb2.Policy) -> RegionPolicy:
    if not 0 <= message.clock_us <= CLOCK_US_MAX or not 0 <= message.protected_to_us <= CLOCK_US_MAX:
        raise InvalidInput("a policy with an impossible clock")
    if max(len(message.store), len(message.hub)) > NAME_BYTES_MAX:
        raise InvalidInput("a policy with a name past its bound")
    if min(message.store_file, message.store_offset) < 0:
        raise InvalidInput("a policy with an impossible position")
    return RegionPolicy(
        clock_us=message.clock_us,
        protected_to_us=message.protected_to_us,
        store=message.store,
        store_position=Position(message.store_file, message.store_offset),
        hub_addresses=tuple(word for word in message.hub_addresses[:HUBS_MAX] if len(word) <= WORD_CHARS_MAX),
        standby=message.standby,
        hub=message.hub,
    )


def assertion_to(assertion: Assertion) -> common_pb2.Assertion:
    return common_pb2.Assertion(
        user=assertion.user,
        role=assertion.role,
        ward=assertion.ward,
        purpose=assertion.purpose,
        expires_at_us=assertion.expires_at_us,
        signature=assertion.signature,
        chain=assertion.chain,
        reach=assertion.reach,
        correlation=assertion.correlation,
        countersignature=assertion.countersignature,
        counter_chain=assertion.counter_chain,
    )


def assertion_from(message: common_pb2.Assertion) -> Assertion:
    return Assertion(
        user=message.user,
        role=message.role,
        ward=message.ward,
        purpose=message.purpose,
        expires_at_us=message.expires_at_us,
        signature=message.signature,
        chain=tuple(message.chain),
        reach=message.reach,
        correlation=message.correlation,
        countersignature=message.countersignature,
        counter_chain=tuple(message.counter_chain),
    )


def receipt_to(received: Received) -> uplink_pb2.Receipt:
    return uplink_pb2.Receipt(
        sop_instance_uid=received.sop_instance_uid,
        digest=received.digest,
        at_us=received.at_us,
        outcome=received.outcome.value,
    )


def receipt_from(message: uplink_pb2.Receipt) -> Received:
    try:
        outcome = Outcome(message.outcome)
    except ValueError:
        raise InvalidInput("a receipt with an outcome that this release does not know") from None
    uid = require_uid(message.sop_instance_uid, "a SOP Instance UID")
    return Received(uid, digest_from(message.digest), message.at_us, outcome)


def verdict_to(verdict: Verdict) -> uplink_pb2.OfferVerdict:
    if verdict.receipt is None:
        return uplink_pb2.OfferVerdict(verdict=uplink_pb2.OfferVerdict.NEED, have_bytes=verdict.have_bytes)
    return uplink_pb2.OfferVerdict(
        verdict=uplink_pb2.OfferVerdict.HAVE, receipt=receipt_to(verdict.receipt)
    )


def verdict_from(message: uplink_pb2.OfferVerdict) -> Verdict:
    if message.verdict == uplink_pb2.OfferVerdict.HAVE:
        return Verdict(receipt_from(message.receipt))
    return Verdict(None, message.have_bytes)


def refusal_to(refused: Refused) -> uplink_pb2.Refusal:
    return uplink_pb2.Refusal(
        sop_instance_uid=refused.sop_instance_uid,
        digest=refused.digest,
        reason=refused.reason,
        permanent=refused.permanent,
    )


def refusal_from(message: uplink_pb2.Refusal) -> Refused:
    return Refused(message.sop_instance_uid, digest_from(message.digest), message.reason, message.permanent)


def status_to(status: WardStatus) -> region_pb2.WardStatus:
    return region_pb2.WardStatus(
        coverage=coverage_to(status.coverage),
        issuer=status.issuer,
        attached=status.attached,
        attached_since_us=status.attached_since_us or 0,
        version=status.version,
        clock_skew_us=status.skew_us,
        report=report_to(status.report) if status.report else None,
        last_receipt_us=status.last_receipt_us or 0,
    )


def status_from(message: region_pb2.WardStatus) -> WardStatus:
    return WardStatus(
        coverage=coverage_from(message.coverage),
        issuer=message.issuer,
        attached=message.attached,
        attached_since_us=message.attached_since_us or None,
        version=message.version,
        skew_us=message.clock_skew_us,
        report=report_from(message.report) if message.HasField("report") else None,
        last_receipt_us=message.last_receipt_us or None,
    )


def ordered_to(delivery: Delivery) -> delivery_pb2.OrderedInstance:
    return delivery_pb2.OrderedInstance(
        sop_instance_uid=delivery.key.sop_instance_uid,
        digest=delivery.key.digest,
        size=delivery.size,
        issuer=delivery.issuer,
        calling_ae=delivery.calling_ae,
    )


def ordered_from(
    message: delivery_pb2.OrderedInstance, *, from_ward: str, to_ward: str, now_us: int
) -> Delivery:
    uid = require_uid(message.sop_instance_uid, "a SOP Instance UID")
    if message.size < 0 or len(message.issuer) > WORD_CHARS_MAX or len(message.calling_ae) > WORD_CHARS_MAX:
        raise InvalidInput("an ordered instance past its bounds")
    key = DeliveryKey(from_ward, to_ward, uid, digest_from(message.digest))
    return Delivery(key, message.issuer, message.calling_ae, message.size, now_us)


def delivery_key_to(key: DeliveryKey) -> delivery_pb2.DeliveryKey:
    return delivery_pb2.DeliveryKey(
        from_ward=key.from_ward, sop_instance_uid=key.sop_instance_uid, digest=key.digest
    )


def delivery_key_from(message: delivery_pb2.DeliveryKey, *, to_ward: str) -> DeliveryKey:
    """The key of a delivery to `to_ward`: a node speaks for its own ward."""
    uid = require_uid(message.sop_instance_uid, "a SOP Instance UID")
    return DeliveryKey(message.from_ward, to_ward, uid, digest_from(message.digest))


def standing_to(standing: DeliveryStanding) -> delivery_pb2.DeliveryStanding:
    return delivery_pb2.DeliveryStanding(
        from_ward=standing.from_ward,
        to_ward=standing.to_ward,
        awaited=standing.awaited,
        ready=standing.ready,
        oldest_us=standing.oldest_us,
        delivered=standing.delivered,
        failed=standing.failed,
        reason=standing.reason,
    )


def standing_from(message: delivery_pb2.DeliveryStanding, *, at_us: int) -> DeliveryStanding:
    return DeliveryStanding(
        message.from_ward,
        message.to_ward,
        message.awaited,
        message.ready,
        message.oldest_us,
        message.delivered,
        message.failed,
        message.reason,
        at_us,
    )


def digest_from(digest: bytes) -> bytes:
    if len(digest) != DIGEST_BYTES:
        raise InvalidInput("a digest that is not 32 bytes")
    return digest


def _level(text: str) -> Level:
    try:
        return Level(text)
    except ValueError:
        raise InvalidQuery("a level that this release does not know") from None


def _state(text: str) -> CoverageState:
    """A state that a newer hub may have is shown as unknown, never as covered."""
    try:
        return CoverageState(text)
    except ValueError:
        return CoverageState.UNKNOWN
