"""Writes spans to a file, one JSON object a line, of a bounded size: the newest, and one file of older ones.
It is what works without a collector; `jq` and tests read it."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

log = logging.getLogger(__name__)


class SpanFile(SpanExporter):
    """See the module's docstring. Raises OSError when the file can't be opened."""

    def __init__(self, path: Path, bytes_max: int) -> None:
        self._path = path
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        lines = "".join(json.dumps(_line(span), separators=(",", ":")) + "\n" for span in spans)
        try:
            with self._lock:
                if self._file.tell() + len(lines) > self._bytes_max:
                    self._turn()
                self._file.write(lines)
                self._file.flush()
        except (OSError, ValueError) as error:  # a full disk, or closed
            log.warning("spans can't be written: %s", type(error).__name__)
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def _turn(self) -> None:
        self._file.close()
        self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        self._file = self._path.open("a")

    def shutdown(self) -> None:
        with self._lock:
            self._file.close()


def _line(span: ReadableSpan) -> dict[str, Any]:
    context = span.get_span_context()
    assert context is not None
    return {
        "trace": f"{context.trace_id:032x}",
        "span": f"{context.span_id:016x}",
        "parent": f"{span.parent.span_id:016x}" if span.parent is not None else "",
        "service": span.resource.attributes.get("service.name", ""),
        "name": span.name,
        "kind": span.kind.name.lower(),
        "start_ns": span.start_time,
        "end_ns": span.end_time,
        "status": span.status.status_code.name.lower(),
        "attributes": dict(span.attributes or {}),
    }
