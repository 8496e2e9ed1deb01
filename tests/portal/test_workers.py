"""The bounds: calls at once, requests at once, and streams whose reader goes away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from archive.archive import Archive
from archive.errors import InvalidInput, OutOfResources
from federation.gathering import Found
from federation.policy import Principal
from portal import multipart, pages
from portal.app import Room
from portal.settings import PortalSettings
from portal.workers import Workers
from tests.datasets import make_instance
from tests.portal.portals import AppMaker, ArchiveSource, signed_in, take_in


def test_past_the_bound_a_call_is_refused_at_once() -> None:
    workers = Workers("test", threads=1, waiting_max=1)
    gate = threading.Event()

    async def main() -> None:
        running = [asyncio.create_task(workers.run(gate.wait, 30)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OutOfResources):
            await workers.run(lambda: None)
        # A caller that hangs up makes no room while its thread still works.
        running[0].cancel()
        await asyncio.sleep(0)
        with pytest.raises(OutOfResources):
            await workers.run(lambda: None)
        gate.set()
        assert await running[1] is True
        assert await workers.run(lambda: "room again") == "room again"

    asyncio.run(main())
    workers.close()


def test_a_stream_is_closed_when_its_reader_goes_away() -> None:
    workers = Workers("test", threads=1, waiting_max=10)
    closed = threading.Event()

    def chunks() -> Iterator[bytes]:
        try:
            while True:
                yield b"x"
        finally:
            closed.set()

    async def main() -> None:
        stream = workers.stream(chunks())
        assert await anext(stream) == b"x"
        await stream.aclose()  # type: ignore[attr-defined]
        assert await asyncio.to_thread(closed.wait, 10)

    asyncio.run(main())
    workers.close()


def test_requests_past_the_bound_are_answered_at_once() -> None:
    async def main() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()

        async def inner(scope: Scope, receive: Receive, send: Send) -> None:
            entered.set()
            await leave.wait()

        async def receive() -> Message:
            return {"type": "http.request"}

        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        room = Room(inner, requests_max=1)
        scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        first = asyncio.create_task(room(scope, receive, send))
        await entered.wait()
        await room(scope, receive, send)
        assert sent[0]["status"] == 503
        leave.set()
        await first
        sent.clear()
        await room(scope, receive, send)
        assert sent == []

    asyncio.run(main())


def test_strangers_fill_their_own_room_and_not_for_ever() -> None:
    async def main() -> None:
        entered = asyncio.Event()

        async def inner(scope: Scope, receive: Receive, send: Send) -> None:
            entered.set()
            if scope["path"] == "/login":
                await asyncio.Event().wait()  # a body that never comes
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def receive() -> Message:
            return {"type": "http.request"}

        sent: list[int] = []

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent.append(message["status"])

        def scope(path: str) -> Scope:
            return {"type": "http", "method": "POST", "path": path, "headers": []}

        room = Room(inner, requests_max=1, public_s_max=0.2)
        stranger = asyncio.create_task(room(scope("/login"), receive, send))
        await entered.wait()
        await room(scope("/login"), receive, send)
        await room(scope("/dicom-web/studies"), receive, send)
        assert sent == [503, 200]
        await asyncio.wait_for(stranger, 10)
        await room(scope("/static/miss.css"), receive, send)
        assert sent == [503, 200, 200]

    asyncio.run(main())


def test_a_form_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "FORM_S_MAX", 0.1)

    async def receive() -> Message:
        await asyncio.Event().wait()
        return {}

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    async def main() -> None:
        scope: Scope = {"type": "http", "method": "POST", "path": "/login", "headers": []}
        with pytest.raises(InvalidInput, match="in time"):
            await asyncio.wait_for(pages.read_form(Request(scope, receive)), 10)
        with pytest.raises(InvalidInput, match="to its end"):
            await pages.read_form(Request(scope, gone))

    asyncio.run(main())


def test_a_body_is_made_in_chunks_of_bounded_size() -> None:
    held: list[int] = []

    def content() -> Iterator[bytes]:
        for _ in range(50):
            held.append(1)
            yield bytes(400_000)

    parts = (multipart.Part("a/b", content()) for _ in range(2))
    sizes, most = [], 0
    for chunk in multipart.body(parts, "mark"):
        sizes.append(len(chunk))
        most = max(most, len(held))
        held.clear()
    assert sum(sizes) > 40_000_000 and max(sizes) < multipart.CHUNK_BYTES + 400_000
    assert most <= 4  # three pieces and a bit make a chunk: nothing is read ahead


class Waiting(ArchiveSource):
    """An archive, and a study that a ward was asked for and does not deliver."""

    gate = threading.Event()
    begun = threading.Semaphore(0)

    def at_hand(
        self,
        principal: Principal,
        study_uid: str,
        series_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> Found | None:
        if study_uid == "1.2.3":
            return None
        return super().at_hand(principal, study_uid, series_uid, sop_instance_uid)

    def instances(
        self,
        principal: Principal,
        study_uid: str,
        series_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> Found:
        if study_uid == "1.2.3":
            self.begun.release()
            self.gate.wait(30)
        return super().instances(principal, study_uid, series_uid, sop_instance_uid)


def test_a_ward_that_does_not_deliver_stops_nothing_that_is_here(
    make_app: AppMaker, archive: Archive
) -> None:
    instance = make_instance()
    take_in(archive, [instance])
    app, metadata = make_app(Waiting(archive), PortalSettings(threads=2)), "/dicom-web/studies/{}/metadata"

    def ask(study_uid: str) -> int:
        headers = {"Accept": "application/dicom+json"}
        return int(signed_in(app, "doc").get(metadata.format(study_uid), headers=headers).status_code)

    with ThreadPoolExecutor() as browsers:
        waiting = [browsers.submit(ask, "1.2.3") for _ in range(4)]
        try:
            for _ in range(2):  # as many as there are threads
                assert Waiting.begun.acquire(timeout=10)
            assert browsers.submit(ask, instance.study_uid).result(10) == 200
            assert signed_in(app, "doc").get("/studies").status_code == 200
        finally:
            Waiting.gate.set()
        assert [one.result(30) for one in waiting] == [404] * 4
