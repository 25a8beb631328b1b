"""Metrics in the format of Prometheus, for `/metrics`. They contain no names of tenants or memories."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from http import HTTPMethod

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as Total
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from deltamem_tool.serve.batching.job import Completion
from deltamem_tool.serve.batching.scheduler import Scheduler

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds, for the store
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # seconds, for answers
OTHER = "other"  # label of methods that HTTP does not have

_GAUGES = {
    "waiting": ("deltamem_queue_requests", "Requests waiting to join the batch."),
    "running": ("deltamem_batch_requests", "Requests in the batch."),
    "cache_bytes": ("deltamem_prefix_cache_bytes", "Bytes of prompt prefixes that are cached for other requests."),
}
_TOTALS = {
    "completed": ("deltamem_answers", "Completed answers."),
    "cancelled": (
        "deltamem_cancelled",
        "Requests whose client disconnected, or that ended with the server's shutdown.",
    ),
    "late": ("deltamem_late", "Requests that were not answered in time."),
    "failed": ("deltamem_failed", "Requests that failed in the model."),
    "prompt_tokens": ("deltamem_prompt_tokens", "Prompt tokens that were computed."),
    "cached_tokens": ("deltamem_cached_tokens", "Prompt tokens that an earlier request had computed."),
    "answer_tokens": ("deltamem_answer_tokens", "Tokens of completed answers."),
    "steps": ("deltamem_steps", "Decode steps."),
    "step_rows": ("deltamem_step_rows", "Sum of the rows of all decode steps."),
    "step_seconds": ("deltamem_step_seconds", "Seconds spent in decode steps."),
    "model_seconds": ("deltamem_model_seconds", "Seconds of the decode steps that were spent in the model."),
}


class _Counters(Collector):
    """The scheduler's counters."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        """Yield the current values."""
        counters = self._scheduler.counters
        for field, (name, words) in _GAUGES.items():
            yield GaugeMetricFamily(name, words, getattr(counters, field))
        for field, (name, words) in _TOTALS.items():
            yield CounterMetricFamily(name, words, getattr(counters, field))


class Metrics:
    """The metrics of a server.

    Args:
        scheduler: its counters are included.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_Counters(scheduler))
        self._requests = Total(
            "deltamem_requests", "Answered requests.", ("method", "path", "status"), registry=registry
        )
        self._seconds = Histogram(
            "deltamem_request_seconds", "Seconds from a request to the end of its answer.", ("path",),
            buckets=LONG, registry=registry,
        )  # fmt: skip
        self._first = Histogram(
            "deltamem_first_token_seconds",
            "Seconds from entering the queue to the first token.",
            buckets=LONG,
            registry=registry,
        )
        self._waited = Histogram(
            "deltamem_queue_seconds", "Seconds in the queue of the batch.", buckets=LONG, registry=registry
        )
        self._store = Histogram(
            "deltamem_store_seconds", "Seconds for reading and writing memories in turns.", ("operation",),
            buckets=SHORT, registry=registry,
        )  # fmt: skip

    def count_request(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count an answered request. Methods that HTTP does not have share a label: a client can invent any number."""
        if method not in HTTPMethod.__members__:
            method = OTHER
        self._requests.labels(method, path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def count_completion(self, completion: Completion) -> None:
        """Count an answer."""
        self._first.observe(completion.first_token)
        self._waited.observe(completion.waited)

    def store(self, operation: str) -> AbstractContextManager[object]:
        """Count the time of a block that uses the store."""
        return self._store.labels(operation).time()

    def text(self) -> bytes:
        """Return all metrics in the format of Prometheus."""
        return generate_latest(self._registry)
