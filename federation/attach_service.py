"""The hub's end of `Attach`: a node's presence, its reports, and what is asked and told down the same call.
It moves messages between the call and `federation/attachments.py`; who calls is the certificate's word, by
`certs/gate.py`. A hub that stands by attaches nodes as one that writes the region's store does.

**Versions.** A node says the newest protocol it speaks; the hub answers with the newest that both do, or
refuses one that it speaks no more, in words that say which side is to be updated. What goes beyond a protocol
is an ability, used where both sides have it (`federation/abilities.py`).

**A line that is dead one way.** A node reports at least every 5 s, and the hub answers each report with what
the region lays down: silence of three reports ends the attach, at either end. gRPC's own pings
(`certs/credentials.py`) are no help there: the side that goes on sending does not miss their answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc

from archive.errors import InvalidInput, MissError, SettingsError, Unavailable
from certs.gate import peer
from federation import abilities, serde, status
from federation.attachments import Attachment, Attachments
from federation.coverage import STALE_AFTER_S
from federation.laying_down import Rules
from federation.settings import HubSettings
from federation.version import PROTOCOL, PROTOCOL_OLDEST
from protos import uplink_pb2

log = logging.getLogger(__name__)

ATTACH = "/miss.v1.Uplink/Attach"
HELLO_WAIT_S = 10.0
CONTROL_BYTES_MAX = 64 << 10
EPOCH_BYTES_MAX = 64


class AttachService:
    """Serves one `Attach` after another."""

    def __init__(self, settings: HubSettings, attachments: Attachments, rules: Rules, version: str) -> None:
        self._settings = settings
        self._attachments = attachments
        self._rules = rules
        self._version = version

    async def attach(self, request_iterator: Any, context: Any) -> None:
        """One attach, from hello to its end."""
        ward = peer(context).ward
        messages = aiter(request_iterator)
        try:
            hello = await _hello(messages)
        except MissError as error:
            log.warning("the attach of %s was refused: %s", ward, error)
            await status.abort(context, error)
        attachment = await self._attachments.attach(ward, hello)
        reason = "the line was lost"
        try:
            await context.write(uplink_pb2.HubMessage(welcome=self._welcome(hello)))
            reason = await self._converse(attachment, messages, context)
        finally:
            # Shielded: the call's cancellation must not keep the ward attached for ever.
            await asyncio.shield(self._attachments.detach(attachment, reason))

    def _welcome(self, hello: uplink_pb2.Hello) -> uplink_pb2.Welcome:
        policy = self._rules.current()
        return uplink_pb2.Welcome(
            protocol=min(hello.protocol, PROTOCOL),
            clock_us=policy.clock_us,
            report_interval_s=self._settings.report_interval_s,
            version=self._version,
            abilities=abilities.OURS,
            policy=serde.policy_to(policy),
        )

    async def _converse(
        self, attachment: Attachment, messages: AsyncIterator[uplink_pb2.NodeMessage], context: Any
    ) -> str:
        """Hears and speaks until either ends; returns why, in words for the log."""
        hear = asyncio.create_task(self._hear(attachment, messages))
        speak = asyncio.create_task(_speak(attachment, context))
        try:
            await asyncio.wait((hear, speak, attachment.ended), return_when=asyncio.FIRST_COMPLETED)
            if attachment.ended.done():
                return attachment.ended.result()
            error = next((task.exception() for task in (hear, speak) if task.done()), None)
            if error is None:
                return "it said goodbye"
            if not isinstance(error, MissError):
                log.error("the attach of %s broke", attachment.ward, exc_info=error)
            return str(error)
        finally:
            for task in (hear, speak):
                task.cancel()
            await asyncio.gather(hear, speak, return_exceptions=True)

    async def _hear(self, attachment: Attachment, messages: AsyncIterator[uplink_pb2.NodeMessage]) -> None:
        while True:
            try:
                async with asyncio.timeout(STALE_AFTER_S):
                    message = await anext(messages)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise Unavailable(f"it was silent for {STALE_AFTER_S:g} s") from None
            if message.ByteSize() > CONTROL_BYTES_MAX:
                raise InvalidInput("it sent a control message larger than 64 KB")
            kind = message.WhichOneof("message")
            if kind == "report":
                await self._attachments.report(attachment.ward, serde.report_from(message.report))
                if abilities.PULSE in attachment.abilities:
                    attachment.send(uplink_pb2.HubMessage(policy=serde.policy_to(self._rules.current())))
            elif kind == "ask_failed":
                failed = message.ask_failed
                self._attachments.failed(attachment.ward, failed.ask_id, failed.reason)


def attach_handler(service: AttachService) -> grpc.RpcMethodHandler[Any, Any]:
    """The call as a hub serves it that has no other of the same service."""
    return grpc.stream_stream_rpc_method_handler(
        service.attach, uplink_pb2.NodeMessage.FromString, uplink_pb2.HubMessage.SerializeToString
    )


async def _hello(messages: AsyncIterator[uplink_pb2.NodeMessage]) -> uplink_pb2.Hello:
    try:
        async with asyncio.timeout(HELLO_WAIT_S):
            message = await anext(messages)
    except (TimeoutError, StopAsyncIteration):
        raise InvalidInput("an attach begins with hello") from None
    if message.WhichOneof("message") != "hello" or len(message.hello.epoch) > EPOCH_BYTES_MAX:
        raise InvalidInput("an attach begins with hello")
    if message.hello.protocol < PROTOCOL_OLDEST:
        raise SettingsError(
            f"this node (version {message.hello.version[:40]}) speaks protocol {message.hello.protocol}, "
            f"the hub {PROTOCOL_OLDEST} or newer: update the node"
        )
    return message.hello


async def _speak(attachment: Attachment, context: Any) -> None:
    while True:
        await context.write(await attachment.outbound.get())
