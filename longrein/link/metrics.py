"""A server's counters in Prometheus' text format. It counts nothing itself: it reads what is shown to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

COUNTERS = {
    "steps": "Environment steps",
    "requests": "Requests answered by an environment",
    "leases_opened": "Leases opened",
    "resumes": "Leases taken over by a new line",
    "repeated_answers": "Requests that came again and were answered from the cache",
    "bad_messages": "Messages that were none",
}


@dataclass(frozen=True)
class Reading:
    """What a server's counters say at one moment."""

    leases: int
    counts: Mapping[str, int]
    faults: Mapping[str, int]  # by code
    seconds: Mapping[str, float]  # spent "environment" and "queue"


class Metrics(Collector):
    """Asks `read` for the counters whenever somebody wants them."""

    def __init__(self, read: Callable[[], Reading]) -> None:
        self._read = read
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        """For the registry."""
        reading = self._read()
        yield GaugeMetricFamily("longrein_leases", "Open leases", reading.leases)
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"longrein_{name}", text, reading.counts.get(name, 0))
        faults = CounterMetricFamily("longrein_faults", "Faults by code", labels=["code"])
        for code, count in sorted(reading.faults.items()):
            faults.add_metric([code], count)
        yield faults
        spent = CounterMetricFamily(
            "longrein_seconds", "Seconds spent in the environment, and waiting", labels=["where"]
        )
        for where, seconds in reading.seconds.items():
            spent.add_metric([where], seconds)
        yield spent
