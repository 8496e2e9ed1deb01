"""A sender of C-STOREs that costs next to nothing beside the server it loads: a forked process for each
association, PDUs cut as references to the instances' own bytes, one system call for a small message. It
measures, and never retries.

What is asked and understood comes from `node/dimse`'s own encodings, which other implementations judge in the
node's tests; the loop that moves bytes is this module's own, so that nothing under test runs in the sender.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import resource
import socket
import ssl
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from ctypes import c_ulonglong
from dataclasses import dataclass, field
from itertools import count, islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from typing import Self

from archive.errors import Unavailable
from miss.load.instances import Buffer, Instance, Numbered
from node.dimse import messages
from node.dimse.pdu import (
    COMMAND_FRAGMENT,
    LAST_FRAGMENT,
    RELEASE_RQ_OCTETS,
    AssociateRequest,
    ContextResult,
    InvalidPdu,
    PduType,
    ProposedContext,
    data_header,
    decode_accept,
    encode_request,
    parse_header,
)
from node.dimse.tls import TlsFiles

CALLING_AE = "MISS-BENCH"
PDU_BYTES_MAX = 128 << 10      # as DCMTK's senders, when the peer takes as much
SMALL_MESSAGE_BYTES = 64 << 10  # joined: cheaper than the vector's bookkeeping
VECTOR_BUFFERS_MAX = 1024      # IOV_MAX
VECTOR_BYTES_MAX = 4 << 20
SILENCE_S_MAX = 180.0          # a peer may take that long over one object
BEGIN_S_MAX = 60.0
END_S_MAX = 10.0
CONTEXT_ID = 1
_PDU_HEADER_BYTES = 6
_PDV_HEADER_BYTES = 6


@dataclass(frozen=True, slots=True)
class Target:
    """Who is loaded."""

    port: int
    called_ae: str
    host: str = "127.0.0.1"
    tls: TlsFiles | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What every association sends: instances `first` + its place, then every `associations`-th one, until
    `seconds` are over or `instances` were sent by all together."""

    associations: int
    seconds: float
    instances: int
    first: int = 0


@dataclass(slots=True)
class Tally:
    """What one association, or all of them, came to. `failures` counts other answers than 0000 by status;
    -1 is an association that ended or was never had. Latencies are seconds from request to response."""

    stored: int = 0
    bytes: int = 0
    failures: Counter[int] = field(default_factory=Counter)
    latencies: array[float] = field(default_factory=lambda: array("d"))
    started: float = 0.0
    ended: float = 0.0
    cpu_s: float = 0.0

    @property
    def failed(self) -> int:
        return self.failures.total()

    @property
    def wall_s(self) -> float:
        return max(self.ended - self.started, 1e-6)

    @property
    def rate(self) -> float:
        """Instances per second that were answered 0000."""
        return self.stored / self.wall_s

    @property
    def bytes_rate(self) -> float:
        return self.bytes / self.wall_s

    def latency_s(self, share: float) -> float:
        """The latency that `share` of all answers did not exceed; 0 when there was none."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


class Load:
    """Senders that are ready: forked, waiting for `begin`. `stored` may be asked at any time from then on.
    Whoever is still there when its `with` block ends is killed."""

    def __init__(self, target: Target, corpus: Numbered, plan: Plan) -> None:
        context = multiprocessing.get_context("fork")  # what they send is ours, and shared
        self._counts = context.RawArray(c_ulonglong, plan.associations)
        self._gate: Barrier = context.Barrier(plan.associations + 1)
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for place in range(plan.associations):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_send, daemon=True,
                                      args=(target, corpus, plan, place, self._gate, self._counts, theirs))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()

    def begin(self) -> None:
        self._gate.wait(BEGIN_S_MAX)

    @property
    def stored(self) -> int:
        """How many were answered 0000 so far."""
        return sum(self._counts)

    def finish(self) -> Tally:
        """Wait for all and add them up. Raises Unavailable when a sender ended without a word."""
        total = Tally()
        try:
            tallies: list[Tally] = [pipe.recv() for pipe in self._pipes]
        except EOFError:
            raise Unavailable("a sending process ended before its work did") from None
        for process in self._processes:
            process.join(END_S_MAX)  # so that what it cost is in what this process has reaped
        for tally in tallies:
            total.stored += tally.stored
            total.bytes += tally.bytes
            total.failures += tally.failures
            total.latencies += tally.latencies
            total.cpu_s += tally.cpu_s
        total.started = min(tally.started for tally in tallies)
        total.ended = max(tally.ended for tally in tallies)
        return total

def send(target: Target, corpus: Numbered, plan: Plan) -> Tally:
    """All of `plan`, from beginning to end."""
    with Load(target, corpus, plan) as load:
        load.begin()
        return load.finish()


class Line:
    """One association over a socket of its own; `step` is how many octets of a data set a PDU holds."""

    def __init__(self, target: Target, contexts: Sequence[ProposedContext],
                 calling_ae: str = CALLING_AE) -> None:
        """Connects and associates; OSError or InvalidPdu when that is not to be had."""
        sock = socket.create_connection((target.host, target.port), SILENCE_S_MAX)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        if target.tls is not None:
            self.sock = _tls_context(target.tls).wrap_socket(sock)
        self._held = b""
        try:
            self.sock.sendall(encode_request(AssociateRequest(
                target.called_ae, calling_ae, tuple(contexts), PDU_BYTES_MAX)))
            kind, body = self.read()
            if kind != PduType.ASSOCIATE_AC:
                raise InvalidPdu(f"no association: PDU type {kind}")
            accept = decode_accept(memoryview(body))
            if any(context.result != ContextResult.ACCEPTANCE for context in accept.contexts):
                raise InvalidPdu("a presentation context was refused")
        except BaseException:
            self.sock.close()
            raise
        self.step = (min(accept.max_pdu_bytes or PDU_BYTES_MAX, PDU_BYTES_MAX) - _PDV_HEADER_BYTES) & ~1

    def read(self) -> tuple[int, bytes]:
        """The next PDU."""
        octets = self._held or self.sock.recv(4096)
        while len(octets) < _PDU_HEADER_BYTES:
            octets += self._more()
        kind, length = parse_header(memoryview(octets)[:_PDU_HEADER_BYTES])
        end = _PDU_HEADER_BYTES + length
        while len(octets) < end:
            octets += self._more()
        self._held = octets[end:]
        return kind, octets[_PDU_HEADER_BYTES:end]

    def _more(self) -> bytes:
        octets = self.sock.recv(65_536)
        if not octets:
            raise ConnectionError("the peer closed the connection")
        return octets

    def status(self) -> int:
        """The status of the response that comes next."""
        kind, body = self.read()
        if kind != PduType.P_DATA_TF:
            raise ConnectionError(f"PDU type {kind} in place of a response")
        return messages.parse(body[_PDV_HEADER_BYTES:]).status

    def command(self, octets: bytes) -> bytes:
        """A command as the PDU that carries it."""
        return data_header(CONTEXT_ID, COMMAND_FRAGMENT | LAST_FRAGMENT, len(octets)) + octets

    def store(self, instance: Instance, message_id: int) -> int:
        """C-STORE; the status."""
        command = self.command(messages.store_request(
            message_id, instance.sop_class_uid, instance.sop_instance_uid))
        if instance.size <= min(self.step, SMALL_MESSAGE_BYTES):
            self.sock.sendall(b"".join((
                command, data_header(CONTEXT_ID, LAST_FRAGMENT, instance.size), *instance.chunks())))
        else:
            self._send_vector(command, fragmented(instance, self.step))
        return self.status()

    def echo(self, message_id: int) -> int:
        """C-ECHO; the status."""
        self.sock.sendall(self.command(messages.echo_request(message_id)))
        return self.status()

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.sendall(RELEASE_RQ_OCTETS)
            self.read()
        self.sock.close()

    def _send_vector(self, first: bytes, rest: Iterator[Buffer]) -> None:
        batch: list[Buffer] = [first]
        held = len(first)
        for buffer in rest:
            batch.append(buffer)
            held += len(buffer)
            if len(batch) == VECTOR_BUFFERS_MAX or held >= VECTOR_BYTES_MAX:
                self._send_batch(batch)
                batch, held = [], 0
        self._send_batch(batch)

    def _send_batch(self, batch: list[Buffer]) -> None:
        if isinstance(self.sock, ssl.SSLSocket):  # knows no vectors, and copies to encrypt anyway
            self.sock.sendall(b"".join(batch))
            return
        while batch:
            sent = self.sock.sendmsg(batch)
            done = 0
            while done < len(batch) and sent >= len(batch[done]):
                sent -= len(batch[done])
                done += 1
            del batch[:done]
            if sent:
                batch[0] = memoryview(batch[0])[sent:]


def fragmented(instance: Instance, step: int) -> Iterator[Buffer]:
    """The data set as P-DATA-TF PDUs of `step` octets each: headers, and views between them."""
    left = instance.size
    room = 0
    for chunk in instance.chunks():
        view = memoryview(chunk)
        while len(view):
            if not room:
                room = min(step, left)
                yield data_header(CONTEXT_ID, LAST_FRAGMENT if room == left else 0, room)
            piece = view[:room]
            yield piece
            room -= len(piece)
            left -= len(piece)
            view = view[len(piece):]


def _tls_context(files: TlsFiles) -> ssl.SSLContext:
    """The name in the peer's certificate is not looked at: it was made for this run, by us."""
    made = ssl.create_default_context(cafile=files.trust)
    made.check_hostname = False
    made.load_cert_chain(files.certificate, files.key)
    return made


def store_context(corpus: Numbered) -> ProposedContext:
    return ProposedContext(CONTEXT_ID, corpus.sop_class_uid, (corpus.transfer_syntax_uid,))


def _send(target: Target, corpus: Numbered, plan: Plan, place: int, gate: Barrier,
          counts: Sequence[int], report: Connection) -> None:
    """One association's process."""
    gc.disable()  # it makes no cycles, and lives for seconds
    tally = Tally()
    share = -(-(plan.instances - place) // plan.associations)  # rounded up
    numbers = islice(count(plan.first + place, plan.associations), share)
    gate.wait(BEGIN_S_MAX)
    tally.started = tally.ended = time.perf_counter()
    used = resource.getrusage(resource.RUSAGE_SELF)
    try:
        _send_all(target, corpus, numbers, tally.started + plan.seconds, tally, place, counts)
    except (OSError, InvalidPdu):
        tally.failures[-1] += 1
    after = resource.getrusage(resource.RUSAGE_SELF)
    tally.cpu_s = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    report.send(tally)
    report.close()


def _send_all(target: Target, corpus: Numbered, numbers: Iterator[int], until: float, tally: Tally,
              place: int, counts: Sequence[int]) -> None:
    line = Line(target, [store_context(corpus)])
    clock = time.perf_counter
    message_id = 0
    now = clock()
    try:
        for number in numbers:
            if now >= until:
                break
            instance = corpus.instance(number)
            message_id = message_id % 0xFFFF + 1
            asked = clock()
            status = line.store(instance, message_id)
            now = tally.ended = clock()
            tally.latencies.append(now - asked)
            if status:
                tally.failures[status] += 1
            else:
                tally.stored += 1
                tally.bytes += instance.size
                counts[place] = tally.stored  # type: ignore[index]
    finally:
        line.release()
