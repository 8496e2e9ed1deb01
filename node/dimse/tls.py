"""Owns TLS for DICOM, profile "BCP 195 RFC 8996, 9325" (PS3.15 B.12): the contexts of both sides, made anew
when their files change, and the wire that carries an association over TLS. It knows no device: which AE title
a certificate may use is admission's to say.

TLS 1.2 and 1.3. Of 1.2 only forward-secret AEAD suites with ECDHE: DHE is left out, as RFC 9325, 4.1 says.
No compression, no renegotiation, no tickets; a session that TLS 1.2 resumes by its number ends with the
context that made it, so that a changed list of authorities counts for the next connection.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import ssl
import stat
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from archive.errors import SettingsError
from node.dimse.errors import AssociationEnded, ConnectionLost, TimedOut
from node.dimse.origin import TLS, Origin, PeerCertificate, read_certificate
from node.dimse.wire import Buffer, Wire

log = logging.getLogger(__name__)

SUITES_1_2 = ":".join((
    "ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-RSA-CHACHA20-POLY1305",
))
RECORD_BYTES = 16 << 10     # the most that one TLS record carries (RFC 8446, 5.1), and one SSL_write sends
CONTEXT_USES_MAX = 1000     # then a new one: with it OpenSSL keeps up to 20,480 sessions of TLS 1.2
NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST")  # OpenSSL's words for what is no record of TLS at all
PEM_BYTES_MAX = 4 << 20     # a file of trusted authorities; the public web's is 0.3 MB


class HandshakeFailed(AssociationEnded):
    """TLS could not be agreed on; the text says why, in words of ours and of OpenSSL."""


class ClientCertificates(Enum):
    """What a listener wants of a client's certificate; the values are those of the setting."""

    REQUIRE = "require"
    ASK = "ask"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the own chain and key, and the authorities that sign the other side's certificates."""

    certificate: Path
    key: Path
    trust: Path | None = None


class Listener:
    """The acceptor's side. `context` is one for the files as they are now: a renewed certificate or another
    authority counts for the next connection, without a restart."""

    def __init__(self, files: TlsFiles, clients: ClientCertificates = ClientCertificates.REQUIRE) -> None:
        """Raises SettingsError when the files are not there or do not fit."""
        self._files = files
        self._clients = clients
        self._lock = threading.Lock()
        self._uses = 0
        self._seen = self._stamp()
        self._context = self._make()

    def context(self) -> ssl.SSLContext:
        with self._lock:
            stamp = self._stamp()
            self._uses += 1
            if stamp != self._seen or self._uses > CONTEXT_USES_MAX:
                # Once for each change: key and certificate are two files, and a pair of which one is new does
                # not fit; the other's change is seen next.
                try:
                    self._context = self._make()
                except SettingsError as error:
                    log.error("the former files of DICOM TLS stay in use: %s", error)
                self._seen, self._uses = stamp, 0
            return self._context

    def _make(self) -> ssl.SSLContext:
        context = _context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
        _load_own(context, self._files)
        if self._clients is ClientCertificates.NONE:
            context.verify_mode = ssl.CERT_NONE
        else:
            if self._files.trust is None:
                raise SettingsError("there is no authority that could sign the clients' certificates")
            _load_trust(context, self._files.trust)
            required = self._clients is ClientCertificates.REQUIRE
            context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
        return context

    def _stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What changes when a file does; None for one that is not there."""
        return tuple(_stamp(path) for path in (self._files.certificate, self._files.key, self._files.trust)
                     if path is not None)


@dataclass(frozen=True, slots=True)
class Dialling:
    """How a requestor speaks TLS. `server_name` is what the peer's certificate must hold: None is the host
    that is dialled, and "" any name that a trusted authority signed."""

    context: ssl.SSLContext
    server_name: str | None = None

    @classmethod
    def by(cls, *, trust: Path | None = None, certificate: Path | None = None, key: Path | None = None,
           server_name: str | None = None) -> Dialling:
        """`trust` is a PEM of authorities (those of the system when None); `certificate` and `key` are shown
        to a peer that asks. Raises SettingsError when the files are not there or do not fit."""
        context = _context(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = server_name != ""
        if trust is not None:
            _load_trust(context, trust)
        else:
            context.load_default_certs()
        if (certificate is None) is not (key is None):
            raise SettingsError("a certificate needs its key, and a key its certificate")
        if certificate is not None and key is not None:
            _load_own(context, TlsFiles(certificate, key))
        return cls(context, server_name)

    def wrap(self, sock: socket.socket, host: str, *, timeout_s: float, buffer_bytes_max: int,
             send_timeout_s: float) -> TlsWire:
        """TLS over a connected socket, agreed on within `timeout_s`. Raises HandshakeFailed, TimedOut or
        ConnectionLost."""
        try:
            wire = TlsWire(sock, self.context, server_name=self.server_name or host,
                           buffer_bytes_max=buffer_bytes_max, send_timeout_s=send_timeout_s)
        except OSError as error:
            sock.close()
            raise ConnectionLost(f"the connection is lost ({_reason(error)})") from None
        try:
            wire.handshake(timeout_s)
        except HandshakeFailed as error:
            wire.close()
            raise HandshakeFailed(f"no TLS with {host}: {error}") from None
        except BaseException:
            wire.close()
            raise
        return wire


class TlsWire(Wire):
    """A wire over TLS, with the same bounds. `handshake` comes first.

    The socket does not block: reads and writes take turns (`_turn`) at OpenSSL's state, which two threads may
    not touch at once, and nobody holds the turn while it waits for the peer. A read takes record after record
    while they are full, so that a bulk of data costs few turns.
    """

    transport = TLS

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_name: str | None = None,
                 buffer_bytes_max: int = 256 << 10, patience_s: float = 60.0,
                 send_timeout_s: float = 60.0) -> None:
        """Server side without `server_name`. Nothing is sent or received yet."""
        self._turn = threading.Lock()
        self._send_timeout_s = send_timeout_s
        self._ended: AssociationEnded | None = None
        self._tls = context.wrap_socket(sock, server_side=server_name is None, server_hostname=server_name,
                                        do_handshake_on_connect=False, suppress_ragged_eofs=False)
        super().__init__(self._tls, buffer_bytes_max=buffer_bytes_max, patience_s=patience_s,
                         send_timeout_s=send_timeout_s)
        self._tls.setblocking(False)

    def handshake(self, timeout_s: float) -> PeerCertificate | None:
        """Agree on TLS within `timeout_s`, however slowly octets trickle in; the peer's certificate."""
        until = time.monotonic() + timeout_s
        while True:
            try:
                self._tls.do_handshake()
                return self._peer_certificate()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as wanted:
                if not self._wait(_events(wanted), until - time.monotonic()):
                    raise TimedOut("the TLS handshake was not done in time") from None
            except ssl.SSLError as error:
                raise HandshakeFailed(_reason(error)) from None
            except OSError as error:
                cause = os.strerror(error.errno) if error.errno else "it was closed"
                raise ConnectionLost(f"the connection ended inside the TLS handshake ({cause})") from None

    def arrive(self, address: str, timeout_s: float) -> Origin:
        certificate = self.handshake(timeout_s)
        return Origin(address, self._tls.version() or TLS, certificate)

    @property
    def can_be_watched(self) -> bool:  # type: ignore[override]
        return not self._tls.pending()

    def fill(self) -> bool:
        """All of it: what OpenSSL held back would not show at the descriptor."""
        filled = super().fill()
        while filled and (left := self._tls.pending()):
            self._make_room(self.held + left)
            filled = super().fill()
        return filled

    def readable(self, patience_s: float = 0.0) -> bool:
        return self._tls.pending() > 0 or super().readable(patience_s)

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._tls.unwrap()  # close_notify goes out; the peer's is not waited for
        super().close()

    def _peer_certificate(self) -> PeerCertificate | None:
        der = self._tls.getpeercert(binary_form=True)
        if der is None:
            return None
        try:
            certificate = read_certificate(der)
        except ValueError:
            raise HandshakeFailed("its certificate can't be read") from None
        if certificate.not_after_s < time.time():  # a resumed session is not asked by OpenSSL
            raise HandshakeFailed("its certificate is not accepted: certificate has expired")
        return certificate

    def _receive_into(self, view: memoryview) -> int:
        until = time.monotonic() + self._receive_timeout_s
        while True:
            count, wanted = self._read(view)
            if not wanted:
                return count
            if not self._wait(wanted, until - time.monotonic()):
                raise BlockingIOError

    def _receive_now(self, view: memoryview) -> int:
        try:
            count, wanted = self._read(view)
        except AssociationEnded:
            raise BlockingIOError from None  # the next receive that waits says why
        if wanted:
            raise BlockingIOError
        return count

    def _read(self, view: memoryview) -> tuple[int, int]:
        """What is there, record after record while they are full; or the event to wait for."""
        done, size = 0, len(view)
        if self._ended is not None:
            raise self._ended
        with self._turn:
            try:
                while True:
                    count = self._tls.recv_into(view[done:] if done else view)
                    done += count
                    if count < RECORD_BYTES or size - done < RECORD_BYTES:
                        return done, 0
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as wanted:
                return done, 0 if done else _events(wanted)
            except ssl.SSLEOFError:
                lost = self._lost("the connection was cut: no close_notify")
            except OSError as error:
                lost = self._lost(f"the connection is lost ({_reason(error)})")
        self._ended = lost  # for the next receive
        if not done:
            raise lost
        return done, 0

    def _send_whole(self, octets: Buffer) -> None:
        with memoryview(octets) as view:
            done = 0
            while done < len(view):
                done += self._write(view[done:])

    def _send_some(self, buffers: Sequence[Buffer]) -> int:
        """The small ones that come first go out as one record; a large one from where it lies."""
        first = buffers[0]
        if len(first) >= RECORD_BYTES or len(buffers) == 1:
            with memoryview(first) as view:
                return self._write(view)
        gathered = bytearray()
        for buffer in buffers:
            gathered += memoryview(buffer)[:RECORD_BYTES - len(gathered)]
            if len(gathered) == RECORD_BYTES:
                break
        self._send_whole(gathered)
        return len(gathered)

    def _send_now(self, octets: Buffer) -> int:
        with self._turn, memoryview(octets) as view:
            return self._tls.send(view)

    def _write(self, view: memoryview) -> int:
        """One SSL_write: at most a record's worth. BlockingIOError when the peer does not read."""
        until = time.monotonic() + self._send_timeout_s
        while True:
            with self._turn:
                try:
                    return self._tls.send(view)
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                    wanted = _events(error)
                except ssl.SSLError as error:
                    raise ConnectionLost(f"the connection is lost ({_reason(error)})") from None
            if not self._wait(wanted, until - time.monotonic()):
                raise BlockingIOError

    def _wait(self, events: int, seconds: float) -> bool:
        """Whether the socket became ready, or ended, within `seconds`."""
        if seconds <= 0:
            return False
        poll = select.poll()
        poll.register(self._tls, events)
        return bool(poll.poll(seconds * 1000))

    def _shutdown(self, how: int) -> None:
        socket.socket.shutdown(self._tls, how)  # SSLSocket's own would drop its state under a reader's feet

    def _set_receive_timeout(self, seconds: float) -> None:
        self._receive_timeout_s = seconds


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(SUITES_1_2)  # of 1.2; those of 1.3 are all of the profile
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    return context


def _load_own(context: ssl.SSLContext, files: TlsFiles) -> None:
    _require(files.certificate, "certificate")
    _require(files.key, "key")
    if stat.S_IMODE(files.key.stat().st_mode) & stat.S_IROTH:
        log.warning("%s, a private key, can be read by everybody on this machine", files.key)
    try:
        # A password, so that an encrypted key fails instead of asking a terminal.
        context.load_cert_chain(files.certificate, files.key, password="")
    except (ssl.SSLError, OSError) as error:
        raise SettingsError(f"{files.certificate} and {files.key} are no certificate and its key in PEM, "
                            f"without a passphrase ({_reason(error)})") from None


def _load_trust(context: ssl.SSLContext, trust: Path) -> None:
    _require(trust, "file of trusted authorities")
    try:
        context.load_verify_locations(trust)
    except (ssl.SSLError, OSError) as error:
        raise SettingsError(f"{trust} holds no certificates in PEM ({_reason(error)})") from None
    if not context.get_ca_certs(binary_form=True):
        raise SettingsError(f"{trust} holds no certificate of an authority")


def _require(path: Path, what: str) -> None:
    try:
        size = path.stat().st_size
        readable = os.access(path, os.R_OK)
    except OSError as error:
        raise SettingsError(f"the {what} {path} can't be read ({error.strerror})") from None
    if not readable or size > PEM_BYTES_MAX:
        raise SettingsError(f"the {what} {path} can't be read or is too large")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _events(wanted: ssl.SSLWantReadError | ssl.SSLWantWriteError) -> int:
    return select.POLLIN if isinstance(wanted, ssl.SSLWantReadError) else select.POLLOUT


def _reason(error: OSError) -> str:
    """OpenSSL's own word for it, in small letters; they are a finite set and name no peer."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError):
        return "it hung up"
    if isinstance(error, ssl.SSLError) and error.reason in NO_TLS:
        return "it does not speak TLS"
    if isinstance(error, ssl.SSLError):
        return (error.reason or "an error of TLS").replace("_", " ").lower()
    return os.strerror(error.errno) if error.errno else type(error).__name__
