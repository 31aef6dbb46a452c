"""What the service counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
IMAGES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """in_flight: requests that are worked at or wait. replicas, retries: set and counted by whoever runs the replicas."""

    def __init__(self, in_flight: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter("srunit_requests", "requests by status", ("kind", "status"), registry=registry)
        self._seconds = Histogram(
            "srunit_request_seconds", "from the header to the answer", ("kind",), buckets=SECONDS, registry=registry
        )
        self._batch = Histogram("srunit_batch_images", "images translated at once", buckets=IMAGES, registry=registry)
        self.retries = Counter("srunit_retries", "requests done again since their replica was lost", registry=registry)
        self.replicas = Gauge("srunit_replicas", "replicas that are ready", registry=registry)
        Gauge("srunit_in_flight", "requests that are worked at or wait", registry=registry).set_function(in_flight)

    def answered(self, kind: str, status: int, seconds: float) -> None:
        self._requests.labels(kind, str(status)).inc()
        self._seconds.labels(kind).observe(seconds)

    def translated(self, batch: int) -> None:
        self._batch.observe(batch)
