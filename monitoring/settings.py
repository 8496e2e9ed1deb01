"""The settings of `[monitoring]` and `[tracing]`, the same in every process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from archive.settings import setting

MIB = 1 << 20


@dataclass(frozen=True)
class MonitoringSettings:
    """Metrics, health and readiness over plain HTTP, without anything of patients."""

    enabled: bool = setting(
        False, "Whether /metrics, /healthz and /readyz are served, at a port of their own. Nobody signs in "
        "there: keep it on loopback, or behind something that asks.",
    )
    host: str = setting("127.0.0.1", "The address to listen on.")
    port: int = setting(9470, "The port to listen on; 0 takes a free one.", minimum=0, maximum=65535)
    read_every_s: float = setting(
        5.0, "What has to be asked of the index or the ledger is asked at most so often, however often it is "
        "scraped.", "s", minimum=0.1, maximum=3600.0,
    )


@dataclass(frozen=True)
class TracingSettings:
    """OpenTelemetry traces. The id of a trace goes from process to process, and into their logs, always;
    spans are kept only where one of these says where to. They hold no patient data."""

    file: Path | None = setting(None, "Spans are written to this file, one JSON object a line.")
    file_bytes_max: int = setting(
        64 * MIB, "At this size the file becomes FILE.1, and the one before goes.", "bytes", minimum=64 << 10
    )
    endpoint: str = setting(
        "", "An OpenTelemetry collector's URL for OTLP over HTTP (http://127.0.0.1:4318/v1/traces); needs "
        "the package opentelemetry-exporter-otlp-proto-http.",
    )
    share: float = setting(
        1.0, "The share of traces that are kept, chosen by their id: all processes keep the same ones.",
        minimum=0.0, maximum=1.0,
    )

    @property
    def enabled(self) -> bool:
        return self.file is not None or bool(self.endpoint)
