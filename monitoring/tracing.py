"""One id for everything that one request makes happen, in every process and thread that has a part in it: W3C
Trace Context, by OpenTelemetry's API. The id is always there, and costs a random number; spans are kept only
after `start`, once in a process, with settings that say where to.

What comes from outside is believed as an id and nothing more: it says which trace a request belongs to, and
decides neither about anybody's rights nor, alone, whether spans are kept.

A thread pool does not hand the current span on; `carried` does.
"""

from __future__ import annotations

import contextvars
import importlib
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from archive.errors import MissError, SettingsError
from monitoring.settings import TracingSettings

if TYPE_CHECKING:  # the SDK is loaded by those who keep spans
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

HEADER = "traceparent"
SLOW_S = 5.0  # what took longer is in the log without being asked for
QUEUE_MAX = 4_096  # spans that wait to be written; more are dropped
# W3C Trace Context, level 1; a later version may have more behind it.
_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z")
_LENGTH_MAX = 128

_provider: TracerProvider | None = None
_tracer: trace.Tracer | None = None


def start(settings: TracingSettings, service: str) -> None:
    """From here on this process keeps spans, if the settings say where. SettingsError when they can't be."""
    global _provider, _tracer
    stop()
    if not settings.enabled:
        return
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

    exporters = _exporters(settings)
    provider = TracerProvider(
        sampler=TraceIdRatioBased(settings.share),
        resource=Resource({"service.name": service}),
        shutdown_on_exit=True,
    )
    for exporter in exporters:
        provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=QUEUE_MAX, schedule_delay_millis=500)
        )
    _provider, _tracer = provider, provider.get_tracer("miss")


def stop() -> None:
    """What was kept is written; nothing is kept any more."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        provider.shutdown()


def _exporters(settings: TracingSettings) -> list[SpanExporter]:
    from monitoring.spanfile import SpanFile

    exporters: list[SpanExporter] = []
    if settings.file is not None:
        try:
            exporters.append(SpanFile(settings.file, settings.file_bytes_max))
        except OSError as error:
            raise SettingsError(f"tracing.file: {settings.file}: {error.strerror}") from None
    if settings.endpoint:
        try:
            otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        except ImportError:
            raise SettingsError(
                "tracing.endpoint needs a package that is not installed: "
                "pip install opentelemetry-exporter-otlp-proto-http"
            ) from None
        exporters.append(otlp.OTLPSpanExporter(endpoint=settings.endpoint))
    return exporters


def parsed(traceparent: str | None) -> SpanContext | None:
    """What a header or a field names; None for what is none, which is as good as nothing."""
    if not traceparent or len(traceparent) > _LENGTH_MAX:
        return None
    found = _FORM.match(traceparent)
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
        return None
    context = SpanContext(
        int(found[2], 16), int(found[3], 16), is_remote=True, trace_flags=TraceFlags(int(found[4], 16) & 1)
    )
    return context if context.is_valid else None


def _current() -> SpanContext | None:
    context = trace.get_current_span().get_span_context()
    return context if context.is_valid else None


def trace_id() -> str:
    """The id of what is under way in this thread or task; empty when it belongs to no request."""
    context = _current()
    return f"{context.trace_id:032x}" if context is not None else ""


def traceparent() -> str:
    """The same with the span, as it is handed on; empty when there is none."""
    context = _current()
    if context is None:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def metadata() -> tuple[tuple[str, str], ...]:
    """What a gRPC call hands on."""
    given = traceparent()
    return ((HEADER, given),) if given else ()


def traceparent_in(pairs: Sequence[tuple[str, Any]] | None) -> str:
    """What came with a gRPC call; empty when nothing did."""
    return next((str(value) for key, value in pairs or () if key == HEADER), "")


@contextmanager
def span(
    name: str, parent: str | None = None, *, kind: SpanKind = SpanKind.INTERNAL, **attributes: str | int
) -> Iterator[Span]:
    """What happens inside is one span: of `parent` (a traceparent from outside), else of what is under way,
    else the first of a new trace. Names and attributes hold no patient data."""
    above = parsed(parent)
    context = None if above is None else trace.set_span_in_context(NonRecordingSpan(above), Context())
    made = _begin(name, context, above, kind, attributes)
    token = attach(trace.set_span_in_context(made, context))
    begun_s, words = time.perf_counter(), ""
    try:
        yield made
    except BaseException as error:
        words = f" ({type(error).__name__})"
        if not isinstance(error, (GeneratorExit, MissError)):
            made.set_status(Status(StatusCode.ERROR, type(error).__name__))
        raise
    finally:
        took_s = time.perf_counter() - begun_s
        level = logging.INFO if took_s >= SLOW_S else logging.DEBUG
        if log.isEnabledFor(level):
            log.log(level, "%s took %.1f ms%s", getattr(made, "name", name), took_s * 1e3, words)
        made.end()
        detach(token)


def _begin(
    name: str, context: Context | None, above: SpanContext | None, kind: SpanKind, attributes: dict[str, Any]
) -> Span:
    if _tracer is not None:
        return _tracer.start_span(
            name, context, kind, attributes, record_exception=False, set_status_on_exception=False
        )
    above = above or _current()
    trace_of = above.trace_id if above is not None else random.getrandbits(128) or 1
    return NonRecordingSpan(SpanContext(trace_of, random.getrandbits(64) or 1, is_remote=False))


def traced(name: str, *, kind: SpanKind = SpanKind.SERVER) -> Callable[[F], F]:
    """A function each call of which is a span."""

    def decorate(function: F) -> F:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with span(name, kind=kind):
                return function(*args, **kwargs)

        return cast(F, call)

    return decorate


def carried(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
    """A call that may run in another thread and belongs to what is under way here."""
    context = contextvars.copy_context()
    return lambda: context.run(function, *args, **kwargs)


class TraceFilter(logging.Filter):
    """Gives each record `trace`: the id of what it is about, empty where it is about no request."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.trace = trace_id()
        return True
