"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from glm4.engine.messages import Stats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.responses = Counter(
            "glm4_responses", "responses by path and status", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "glm4_request_seconds", "from a request's head to its response's end", ["path"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "glm4_time_to_first_token_seconds", "from a request's admission to its first words",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.next_token = Histogram(
            "glm4_inter_token_seconds", "mean time between an answer's tokens after the first words",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter("glm4_prompt_tokens", "tokens of prompts, once for each answer", registry=registry)
        self.answer_tokens = Counter("glm4_answer_tokens", "tokens of answers, cut ones included", registry=registry)
        self.aborts = Counter("glm4_aborts", "answers that were ended before their end", registry=registry)
        self._engine = _EngineCollector()
        registry.register(self._engine)

    def exposition(self, stats: Stats | None, health: str, num_restarts: int) -> bytes:
        """All of it in Prometheus's text format; `stats` is None while there is no engine."""
        self._engine.take(stats, health, num_restarts)
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's own numbers, as it told them last."""

    def __init__(self) -> None:
        self._metrics: list[Metric] = []

    def take(self, stats: Stats | None, health: str, num_restarts: int) -> None:
        ready = GaugeMetricFamily("glm4_engine_ready", "1 while requests are served", value=float(health == "ready"))
        restarts = CounterMetricFamily("glm4_engine_restarts", "starts after a crash", value=num_restarts)
        self._metrics = [ready, restarts]
        if stats is None:
            return
        self._metrics += [
            GaugeMetricFamily("glm4_running", "answers being computed", value=stats.running),
            GaugeMetricFamily("glm4_waiting", "answers that wait for their turn", value=stats.waiting),
            GaugeMetricFamily("glm4_kv_blocks", "blocks of the KV cache", value=stats.kv_blocks),
            GaugeMetricFamily("glm4_kv_blocks_used", "blocks that answers hold", value=stats.kv_blocks_used),
            CounterMetricFamily(
                "glm4_prefix_queried_tokens", "prompt tokens looked up in the cache", value=stats.prefix_queried_tokens
            ),
            CounterMetricFamily("glm4_prefix_hit_tokens", "those found there", value=stats.prefix_hit_tokens),
            CounterMetricFamily("glm4_prefill_tokens", "prompt tokens computed", value=stats.prefill_tokens),
            CounterMetricFamily("glm4_prefill_seconds", "in steps with prompt tokens", value=stats.prefill_seconds),
            CounterMetricFamily("glm4_decode_tokens", "answer tokens computed", value=stats.decode_tokens),
            CounterMetricFamily("glm4_decode_seconds", "in all other steps", value=stats.decode_seconds),
        ]

    def collect(self) -> Iterable[Metric]:
        """What the registry asks for."""
        return self._metrics
