"""What is served to those who watch over a process, when all is well and when it is not."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import httpx
import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from archive.errors import SettingsError, Unavailable
from monitoring import checks
from monitoring.checks import Check
from monitoring.measures import Distribution, Tally, counter, histogram
from monitoring.readings import Cached
from monitoring.server import AT_ONCE_MAX, MonitoringServer
from monitoring.settings import MonitoringSettings

LOOPBACK = MonitoringSettings(enabled=True, port=0)


class Process:
    def __init__(self) -> None:
        self.seconds = Distribution((0.1, 1.0))
        self.came = Tally()
        self.alive: Mapping[str, Check] = {"loop": lambda: None}
        self.ready: Mapping[str, Check] = {"store": lambda: None, "ledger": lambda: 7}

    def families(self) -> Iterator[Metric]:
        yield histogram("miss_some_seconds", "Words.", of={"": self.seconds})
        yield counter("miss_some", "Words.", label="ward", of=self.came.now())
        yield GaugeMetricFamily("miss_one", "Words.", value=1)


@contextmanager
def served(process: Process) -> Iterator[Callable[[str], httpx.Response]]:
    server = MonitoringServer(LOOPBACK, process)
    server.start()
    try:
        yield lambda path: httpx.get(f"http://127.0.0.1:{server.port}{path}", timeout=10)
    finally:
        server.stop()


def test_measures_are_told_as_prometheus_reads_them() -> None:
    process = Process()
    for seconds in (0.05, 0.1, 0.5, 7.0):
        process.seconds.observe(seconds)
    process.seconds.observe(0.5, 2)
    process.came.add("a/b", 3)
    with served(process) as get:
        families = {one.name: one for one in text_string_to_metric_families(get("/metrics").text)}
    samples = {(one.name, *one.labels.values()): one.value for one in families["miss_some_seconds"].samples}
    assert samples == {
        ("miss_some_seconds_bucket", "0.1"): 2, ("miss_some_seconds_bucket", "1.0"): 5,
        ("miss_some_seconds_bucket", "+Inf"): 6, ("miss_some_seconds_count",): 6,
        ("miss_some_seconds_sum",): pytest.approx(8.65),
    }  # fmt: skip
    [sample] = families["miss_some"].samples
    assert (sample.labels, sample.value) == ({"ward": "a/b"}, 3)


def test_health_and_readiness_say_what_is_wrong() -> None:
    process = Process()

    def fails() -> None:
        raise Unavailable("the index is behind its bound")

    process.ready = {"store": fails, "ledger": lambda: 7}
    with served(process) as get:
        assert (get("/healthz").status_code, get("/healthz").json()) == (200, {"healthy": True})
        answer = get("/readyz")
        assert answer.status_code == 503
        assert [json.loads(line) for line in answer.text.splitlines()] == [
            {"check": "store", "reason": "the index is behind its bound"}]
        assert get("/").status_code == get("/metrics/more").status_code == 404


def test_a_check_that_hangs_costs_its_time_and_no_more_threads() -> None:
    hanging, begun = threading.Event(), []

    def hangs() -> None:
        begun.append(1)
        hanging.wait(30)

    watched = checks.Checks({"loop": hangs, "other": lambda: None}, wait_s=0.05)
    try:
        assert [watched.failed() for _ in range(3)] == 3 * [{"loop": "no answer within 0.05 s"}]
        assert len(begun) == 1
    finally:
        hanging.set()
        watched.close()


def test_connections_are_bounded_and_a_silent_one_blocks_nobody() -> None:
    process = Process()
    server = MonitoringServer(LOOPBACK, process)
    server.start()
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(AT_ONCE_MAX - 1)]
    try:
        assert httpx.get(f"http://127.0.0.1:{server.port}/healthz", timeout=10).status_code == 200
        silent += [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
        for one in silent[AT_ONCE_MAX:]:
            one.settimeout(10)
            assert one.recv(1) == b""  # turned away at once
    finally:
        for one in silent:
            one.close()
        server.stop()


def test_a_port_that_is_taken_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = MonitoringSettings(enabled=True, port=other.getsockname()[1])
        with pytest.raises(SettingsError, match="monitoring.port"):
            MonitoringServer(taken, Process())


def test_what_costs_a_question_is_asked_once_for_many_scrapes() -> None:
    asked = 0

    def read() -> int:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise Unavailable("the index does not answer")
        return 42

    often = Cached(read, 60.0)
    assert [often.now() for _ in range(5)] == [42] * 5 and asked == 1
    always = Cached(read, 0.0)
    assert always.now() is None and always.failed
