"""What Prometheus is told: requests, failures, how long they took, and searches under way."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # the histogram's bounds
LEFT = 499  # the status of a request whose client has left, as proxies have it


class Metrics:
    """The figures of one service."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        prefix = "embeddings_pipeline"
        self._requests = Counter(
            f"{prefix}_requests", "Requests that were answered.", ["path", "status"], registry=registry
        )
        self._failures = Counter(
            f"{prefix}_failures", "Requests that were answered with 5xx.", ["path"], registry=registry
        )
        self._seconds = Histogram(
            f"{prefix}_request_seconds", "How long they took.", ["path"], registry=registry, buckets=SECONDS
        )
        self._again = Counter(
            f"{prefix}_searches_tried_again", "Searches made again since a session was lost.", registry=registry
        )
        self._under_way = Gauge(f"{prefix}_searches_under_way", "Searches that have a place.", registry=registry)

    def count_under_way(self, count: Callable[[], int]) -> None:
        self._under_way.set_function(count)

    def tried_again(self) -> None:
        self._again.inc()

    def answered(self, path: str, status: int, seconds: float) -> None:
        """`path`: one of few, since each has figures of its own."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)
        if status >= 500:
            self._failures.labels(path).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
