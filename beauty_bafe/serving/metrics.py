"""The metrics for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Metrics of one app, in a registry of its own, so that several apps can run in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("requests", "Requests answered", ["endpoint", "status"], "beauty_bafe", registry=self.registry)
        self.seconds = Histogram(
            "seconds", "Duration of a stage", ["stage"], "beauty_bafe", registry=self.registry, buckets=SECONDS
        )
        self.batch_size = Histogram(
            "batch_size", "Pictures in a batch", (), "beauty_bafe", registry=self.registry, buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        self.waiting = Gauge("queue", "Pictures waiting for a batch", (), "beauty_bafe", registry=self.registry)
        self.pictures = Gauge("index_pictures", "Pictures in the index", (), "beauty_bafe", registry=self.registry)
        self.version = Gauge("index_version", "Version of the index", (), "beauty_bafe", registry=self.registry)

    def stage(self, name: str, seconds: float) -> None:
        """Record the duration of a stage: queue, batch, request or change."""
        self.seconds.labels(name).observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
