"""OpenTelemetry: one trace a request, to the collector that the usual environment variables name."""

from __future__ import annotations

import os

from starlette.types import ASGIApp

from glm4.errors import OptionError

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def traced(app: ASGIApp) -> ASGIApp:
    """`app` with a span for each request where a collector is named, `app` itself where none is.

    Paths, methods and statuses are in the spans, no words. Raises OptionError where the otel extra is not installed.
    """
    named = [name for name in _ENDPOINTS if os.environ.get(name)]
    if not named:
        return app
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise OptionError(f"{named[0]} is set, and tracing is not installed: pip install 'glm4[otel]'") from error
    provider = TracerProvider(resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "glm4")}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    traced_app: ASGIApp = OpenTelemetryMiddleware(
        app, exclude_spans=["receive", "send"], excluded_urls="health,metrics", tracer_provider=provider
    )
    return traced_app
