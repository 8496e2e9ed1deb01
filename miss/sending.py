"""Sends instances to an application entity by C-STORE and keeps account of what became of each. Chooses
contexts and associations; says nothing to the user itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from archive.errors import InvalidInput
from certs.invites import split_address
from miss.device import require_ae_title
from miss.samples import Instance
from node.dimse.association import Limits
from node.dimse.contexts import plan
from node.dimse.errors import AssociationEnded, ConnectionLost, PeerAborted, Rejected, TimedOut
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Peer, Requestor

CALLING_AE = "MISS-SEND"
TRIES = 3  # of an instance whose association broke: a node that restarts is not an error yet
FAILURES_KEPT_MAX = 100


@dataclass(slots=True)
class Account:
    """What became of the instances. `failures` says why, by reason; `failed_uids` are the first hundred."""

    sent: int = 0
    failed: int = 0
    bytes: int = 0
    warnings: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    failed_uids: list[str] = field(default_factory=list)

    def fail(self, uid: str, reason: str) -> None:
        self.failed += 1
        self.failures[reason] += 1
        if len(self.failed_uids) < FAILURES_KEPT_MAX:
            self.failed_uids.append(uid)


def parse_peer(text: str) -> Peer:
    """AE@HOST:PORT, as DICOM people write an application entity."""
    ae_title, at, address = text.rpartition("@")
    if not at:
        raise InvalidInput(f"{text!r}: write AE@HOST:PORT, for example MISS@10.2.0.5:11112")
    host, port = split_address(address)
    return Peer(host, port, require_ae_title(ae_title))


def send_all(
    peer: Peer, instances: Iterable[Instance], contexts: Sequence[tuple[str, str]], *,
    calling_ae: str = CALLING_AE, limits: Limits | None = None,
    progress: Callable[[Account], None] = lambda account: None, account: Account | None = None,
) -> Account:
    """Sends every instance, in order, over one association at a time. `contexts` names every pair of SOP
    class and transfer syntax among them; past 128 of them a second association is made (PS3.8 9.3.2.2).

    Raises what `Requestor.connect` raises when the peer can't be reached at all or does not let us in.
    """
    account = account or Account()
    sets = plan(contexts)
    found = {(context.abstract_syntax, context.transfer_syntaxes[0]): number
             for number, proposed in enumerate(sets) for context in proposed}
    open_associations = _Associations(peer, calling_ae, sets, limits)
    try:
        for instance in instances:
            number = found[instance.sop_class_uid, instance.transfer_syntax_uid]
            _send_one(open_associations, number, instance, account)
            progress(account)
    except BaseException:
        open_associations.abort()
        raise
    open_associations.release()
    return account


class _Associations:
    """The one association that is open now, for one of the context sets."""

    def __init__(self, peer: Peer, calling_ae: str, sets: Sequence[Sequence[ProposedContext]],
                 limits: Limits | None) -> None:
        self._peer, self._calling_ae, self._limits = peer, calling_ae, limits
        self._sets = sets
        self._open: tuple[int, Requestor] | None = None

    def get(self, number: int) -> Requestor:
        if self._open is not None and self._open[0] == number:
            return self._open[1]
        self.release()
        proposed = self._sets[number]
        requestor = Requestor.connect(self._peer, self._calling_ae, proposed, limits=self._limits)
        self._open = (number, requestor)
        return requestor

    def release(self) -> None:
        if self._open is not None:
            self._open[1].release()
            self._open = None

    def abort(self) -> None:
        if self._open is not None:
            self._open[1].abort()
            self._open = None


def _send_one(associations: _Associations, number: int, instance: Instance, account: Account) -> None:
    uid = instance.sop_instance_uid
    for attempt in range(1, TRIES + 1):
        try:
            requestor = associations.get(number)
            context = requestor.context(instance.sop_class_uid, instance.transfer_syntax_uid)
            if context is None:
                account.fail(uid, "the peer takes no such SOP class in this transfer syntax")
                return
            dataset = instance.dataset()
            status = requestor.store(context, uid, (dataset,))
        except Rejected:
            raise
        except AssociationEnded as ended:
            associations.abort()
            if attempt == TRIES or not isinstance(ended, ConnectionLost | PeerAborted | TimedOut):
                if account.sent == 0 and isinstance(ended, ConnectionLost):
                    raise
                account.fail(uid, str(ended))
                return
            continue
        _note(account, uid, status, len(dataset))
        return


def _note(account: Account, uid: str, status: int, size: int) -> None:
    """PS3.4 Table B.2-1: 0000 stored, Bxxx stored with a warning, anything else not stored."""
    if status == 0 or status & 0xF000 == 0xB000:
        account.sent += 1
        account.bytes += size
        if status:
            account.warnings[f"{status:04X}"] += 1
    else:
        account.fail(uid, f"refused with status {status:04X}")
