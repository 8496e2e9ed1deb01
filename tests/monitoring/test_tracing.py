"""The id of a trace: what is believed of what comes from outside, and how it gets into other threads."""

from __future__ import annotations

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from archive.errors import NotFound, SettingsError
from monitoring import tracing
from monitoring.settings import TracingSettings

GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize("text", [
    "", "nonsense", GIVEN.upper(), GIVEN + "-more", "ff" + GIVEN[2:], GIVEN[:-3],
    f"00-{'0' * 32}-{GIVEN[36:]}", f"{GIVEN[:36]}{'0' * 16}-01", "01" + GIVEN[2:] + "-" + "x" * 200,
    GIVEN + "\n",
])  # fmt: skip
def test_what_is_no_traceparent_begins_a_new_trace(text: str) -> None:
    assert tracing.parsed(text) is None
    with tracing.span("request", text):
        assert len(tracing.trace_id()) == 32
        assert tracing.trace_id() not in GIVEN and tracing.trace_id() != "0" * 32


def test_a_later_version_may_have_more_behind_it() -> None:
    found = tracing.parsed("01" + GIVEN[2:] + "-more")
    assert found is not None and f"{found.trace_id:032x}" in GIVEN


def test_an_id_is_there_also_when_nothing_is_kept() -> None:
    assert tracing.trace_id() == "" and tracing.traceparent() == "" and tracing.metadata() == ()
    with tracing.span("request", GIVEN):
        outer = tracing.traceparent()
        with tracing.span("part"):
            assert tracing.trace_id() == GIVEN[3:35]
            assert tracing.traceparent()[36:52] not in (GIVEN[36:52], outer[36:52])
        assert tracing.traceparent() == outer
    assert tracing.trace_id() == ""


def test_it_goes_into_other_threads_and_not_into_later_work_of_theirs() -> None:
    with ThreadPoolExecutor(1) as pool:
        with tracing.span("request", GIVEN):
            carried = pool.submit(tracing.carried(tracing.trace_id)).result()
        assert carried == GIVEN[3:35]
        assert pool.submit(tracing.trace_id).result() == ""


def test_two_tasks_have_their_own() -> None:
    async def one() -> str:
        with tracing.span("request"):
            before = tracing.trace_id()
            await asyncio.sleep(0)
            assert tracing.trace_id() == before
            return before

    async def both() -> list[str]:
        return list(await asyncio.gather(one(), one()))

    assert len(set(asyncio.run(both()))) == 2


def test_log_records_say_what_they_are_about() -> None:
    record = logging.makeLogRecord({"msg": "words"})
    with tracing.span("request", GIVEN):
        tracing.TraceFilter().filter(record)
    assert record.__dict__["trace"] == GIVEN[3:35]


def test_spans_are_kept_in_a_file_of_a_bounded_size(tmp_path: Path) -> None:
    file = tmp_path / "spans.jsonl"
    tracing.start(TracingSettings(file=file, file_bytes_max=64 << 10), "test")
    try:
        for _ in range(900):  # about 250 bytes each
            with tracing.span("request", GIVEN, ward="san-martino/radiology"):
                pass
        with pytest.raises(NotFound), tracing.span("a refusal is no error"):
            raise NotFound("no such study of Rossi")
    finally:
        tracing.stop()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spans.jsonl", "spans.jsonl.1"]
    assert all(path.stat().st_size <= 200 << 10 for path in tmp_path.iterdir())
    last = json.loads(file.read_text().splitlines()[-1])
    assert last["name"] == "a refusal is no error" and last["status"] == "unset" and last["service"] == "test"
    assert "Rossi" not in file.read_text()


def test_a_share_of_none_keeps_none(tmp_path: Path) -> None:
    tracing.start(TracingSettings(file=tmp_path / "spans.jsonl", share=0.0), "test")
    with tracing.span("request", GIVEN):
        assert tracing.trace_id() == GIVEN[3:35]
    tracing.stop()
    assert (tmp_path / "spans.jsonl").read_text() == ""


def test_a_collector_needs_its_package() -> None:
    with pytest.raises(SettingsError, match="opentelemetry-exporter-otlp-proto-http"):
        tracing.start(TracingSettings(endpoint="http://127.0.0.1:1/v1/traces"), "test")
