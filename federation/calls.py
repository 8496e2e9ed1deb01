"""What is common to those who call a hub: telling a call that its channel ended from a task that was ended,
and what a line brings with it in the log."""

from __future__ import annotations

import asyncio
import logging

import grpc
import grpc.aio

from archive.errors import MissError

log = logging.getLogger(__name__)


def raise_if_ours(error: BaseException) -> None:
    """A call on a channel that closes ends as if its task had been cancelled: only a real one goes on up."""
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        raise error


def say(what: str, error: BaseException) -> None:
    """Logs what a line brings with it."""
    if isinstance(error, grpc.aio.AioRpcError):
        log.info("%s: %s %s", what, error.code().name, error.details())
    elif isinstance(error, (MissError, asyncio.InvalidStateError, asyncio.CancelledError)):
        log.warning("%s: %s", what, error)
    else:
        log.error(what, exc_info=error)


async def until(event: asyncio.Event, timeout_s: float | None) -> None:
    """Waits for the event, at most this long."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
