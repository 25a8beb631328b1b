"""Metrics in the format of Prometheus, for `/metrics`. They contain no names of tenants or memories."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as Total
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from deltamem_tool.serve.batching.job import Completion
from deltamem_tool.serve.batching.scheduler import Scheduler

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds of a store
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # of an answer

_GAUGES = {
    "waiting": ("deltamem_queue_requests", "Requests that wait for a place in the batch."),
    "running": ("deltamem_batch_requests", "Requests in the batch."),
    "cache_bytes": ("deltamem_prefix_cache_bytes", "Beginnings of prompts that are kept for others."),
}
_TOTALS = {
    "completed": ("deltamem_answers", "Answers that were completed."),
    "cancelled": ("deltamem_cancelled", "Requests whose client went, or that the end of the server cut off."),
    "late": ("deltamem_late", "Requests that were not answered in time."),
    "failed": ("deltamem_failed", "Requests that the model failed at."),
    "prompt_tokens": ("deltamem_prompt_tokens", "Tokens of prompts that were computed."),
    "cached_tokens": ("deltamem_cached_tokens", "Tokens of prompts that an earlier request had computed."),
    "answer_tokens": ("deltamem_answer_tokens", "Tokens of answers."),
    "steps": ("deltamem_steps", "Decode steps."),
    "step_rows": ("deltamem_step_rows", "Rows of all decode steps together."),
    "step_seconds": ("deltamem_step_seconds", "Seconds of all decode steps together."),
    "model_seconds": ("deltamem_model_seconds", "Of these, seconds in the model."),
}


class _Counters(Collector):
    """The scheduler's counters."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        """Yield each as it is now."""
        counters = self._scheduler.counters
        for field, (name, words) in _GAUGES.items():
            yield GaugeMetricFamily(name, words, getattr(counters, field))
        for field, (name, words) in _TOTALS.items():
            yield CounterMetricFamily(name, words, getattr(counters, field))


class Metrics:
    """What is counted.

    Args:
        scheduler: whose counters are among it.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_Counters(scheduler))
        self._requests = Total(
            "deltamem_requests", "Requests that were answered.", ("method", "path", "status"), registry=registry
        )
        self._seconds = Histogram(
            "deltamem_request_seconds", "From a request to the end of its answer.", ("path",),
            buckets=LONG, registry=registry,
        )  # fmt: skip
        self._first = Histogram(
            "deltamem_first_token_seconds", "From the queue to the first token.", buckets=LONG, registry=registry
        )
        self._waited = Histogram(
            "deltamem_queue_seconds", "In the queue of the batch.", buckets=LONG, registry=registry
        )
        self._store = Histogram(
            "deltamem_store_seconds", "Of reading and writing memories in turns.", ("operation",),
            buckets=SHORT, registry=registry,
        )  # fmt: skip

    def request(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(method, path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def completion(self, completion: Completion) -> None:
        """Count an answer."""
        self._first.observe(completion.first_token)
        self._waited.observe(completion.waited)

    def store(self, operation: str) -> AbstractContextManager[object]:
        """Count the time of a block that uses the store."""
        return self._store.labels(operation).time()

    def text(self) -> bytes:
        """Return all of it in Prometheus' format."""
        return generate_latest(self._registry)
