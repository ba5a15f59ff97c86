"""OpenTelemetry: what arrives at a collector, read with the protocol's own classes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from serving import ask, start_server

TRACE = "0af7651916cd43dd8448eb211c80319c"


class Collector(HTTPServer):
    """Takes what is exported to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.spans: list[Span] = []
        self.services: set[str] = set()


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        collector = self.server
        assert isinstance(collector, Collector)
        data = self.rfile.read(int(self.headers["content-length"]))
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            attributes = {each.key: each.value.string_value for each in resource.resource.attributes}
            collector.services.add(attributes["service.name"])
            for scope in resource.scope_spans:
                collector.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing on standard error."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


def test_each_request_is_a_span_of_its_callers_trace(collector: Collector) -> None:
    server = start_server(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{collector.server_port}", OTEL_SERVICE_NAME="mine"
    )
    try:
        body = str(ask("你好", max_tokens=4)).replace("'", '"').encode()
        path = "/v1/chat/completions"
        response = server.request("POST", path, body, traceparent=f"00-{TRACE}-b7ad6b7169203331-01")
        assert response.status == 200
        response.read()
        server.request("GET", "/health").read()
        server.request("GET", "/v1/models").read()
    finally:
        assert server.stop() == 0
    assert collector.services == {"mine"}
    by_name = {span.name: span for span in collector.spans}
    assert set(by_name) == {f"POST {path}", "GET /v1/models"}
    span = by_name[f"POST {path}"]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, "b7ad6b7169203331")
    assert "你好" not in str(span)
