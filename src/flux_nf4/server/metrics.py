"""`/metrics` for Prometheus: what the engine tells as it happens, and its state when asked.

Labels have few values, all of them ours: no prompt, no id, no key. Times are in seconds, sizes in
bytes. The registry is the server's own, so that two servers in one process do not add up.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flux_nf4 import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flux_nf4.server.context import Context
    from flux_nf4.server.engine import Engine

_BUCKETS_S = (0.05, 0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_STEP_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_STAGES = {
    "text": "text_encode",
    "modulation": "modulation",
    "encode": "vae_encode",
    "denoise": "denoise",
    "decode": "vae_decode",
    "save": "encode_image",
}
# What is found in the reason that is told, and the word for it.
_LOSSES = (
    ("no sign of life", "hang"),
    ("was ended by", "signal"),
    ("exited with", "exit"),
    ("no message", "protocol"),
)


class Metrics:
    """The counters and histograms of one engine; `observe` goes into its `on_event`."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_State(engine))
        ProcessCollector(registry=self.registry)
        self._requests = self._counter("requests", "Jobs by end.", "api", "status", "finish_reason")
        self._duration = self._histogram("request_duration", "From request to end.", "api")
        self._queue = self._histogram("queue", "From request to the first step's start.")
        self._preview = self._histogram("first_preview", "From request to first preview.")
        self._stage = self._histogram("stage", "Each stage of a job.", "stage")
        self._step = self._histogram("step", "Each denoising step.", buckets=_STEP_BUCKETS_S)
        self._images = self._counter("images", "Images that were finished.")
        self._pixels = self._counter("pixels", "Pixels of finished images.")
        self._steps = self._counter("steps", "Denoising steps, of unfinished images too.")
        self._rejections = self._counter("admission_rejections", "Not taken, and why.", "reason")
        self._cancelled = self._counter("cancelled", "Jobs stopped, and by what.", "cause")
        self._out_of_memory = self._counter(
            "oom", "Memory ran out, and what was done.", "stage", "action"
        )
        self._restarts = self._counter("worker_restarts", "Workers lost, and how.", "reason")
        self._replays = self._counter("replays", "Jobs begun again.", "reason")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"flux_nf4_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _BUCKETS_S
    ) -> Histogram:
        return Histogram(
            f"flux_nf4_{name}_seconds", text, labels, buckets=buckets, registry=self.registry
        )

    def observe(self, name: str, **facts: Any) -> None:
        """Count an event of the engine; one that is not known is passed over."""
        match name:
            case "job_started":
                self._queue.observe(facts["queue_s"])
            case "first_preview":
                self._preview.observe(facts["duration_s"])
            case "stage":
                stage = _STAGES.get(facts["stage"], "other")
                self._stage.labels(stage).observe(facts["duration_s"])
            case "step":
                self._steps.inc()
                self._step.observe(facts["duration_s"])
            case "image":
                self._images.inc()
                self._pixels.inc(facts["width"] * facts["height"])
            case "job_finished":
                self._count_finished(**facts)
            case _:
                self._count_trouble(name, **facts)

    def _count_finished(
        self, *, api: str, state: str, duration_s: float, code: str | None, **_: Any
    ) -> None:
        self._requests.labels(api, state, code or state).inc()
        self._duration.labels(api).observe(duration_s)

    def _count_trouble(self, name: str, **facts: Any) -> None:
        match name:
            case "job_cancelled":
                self._cancelled.labels(facts["cause"]).inc()
            case "out_of_memory":
                stage = _STAGES.get(facts["stage"], "other")
                self._out_of_memory.labels(stage, facts["action"]).inc()
            case "rejected":
                self._rejections.labels(facts["reason"]).inc()
            case "replayed":
                self._replays.labels(facts["reason"]).inc()
            case "worker_restarted":
                words = (word for found, word in _LOSSES if found in facts["reason"])
                self._restarts.labels(next(words, "other")).inc()


class _State(Collector):
    """The engine's state, read when it is asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Any]:
        """Nothing, so that registering does not ask an engine that has not started."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All gauges, and what the workers count themselves."""
        status, model = self._engine.status(), self._engine.capabilities
        yield _gauge("requests_waiting", "Jobs in the queue.", status.num_queued)
        yield _gauge("requests_running", "Jobs that are drawn.", status.num_running)
        yield _gauge("ready", "1 where jobs are taken and drawn.", int(status.is_ready))
        yield _gauge("lora_loaded", "LoRA adapters in use.", 0)
        yield _gauge("build_info", "Always 1.", 1, version=__version__)
        if model is not None:
            yield _gauge(
                "model_info",
                "Always 1. sha: SHA-256 of its files' headers and of samples of their data.",
                1,
                sha=model.sha,
                model=model.model,
                variant=model.variant,
                quantization=model.quantization,
                licence=model.licence,
            )
        workers = GaugeMetricFamily(
            "flux_nf4_workers", "Worker processes by state.", labels=("device", "state")
        )
        memory = GaugeMetricFamily(
            "flux_nf4_host_bytes", "Main memory of each worker process.", labels=("device",)
        )
        vram = GaugeMetricFamily(
            "flux_nf4_vram_bytes",
            "Memory of each device: the budget, and the peak of the last job.",
            labels=("device", "kind"),
        )
        resident = GaugeMetricFamily(
            "flux_nf4_weights_resident_bytes",
            "Weights that stay in each device's memory between jobs.",
            labels=("device",),
        )
        moved = CounterMetricFamily(
            "flux_nf4_offload_bytes",
            "Weights brought to each device; none is ever brought back.",
            labels=("device", "direction"),
        )
        for worker in status.workers:
            workers.add_metric((worker.device, worker.state), 1)
            if worker.usage is not None:
                for kind in ("budget", "peak"):
                    vram.add_metric((worker.device, kind), worker.usage[kind])
                resident.add_metric((worker.device,), worker.usage["resident"])
                moved.add_metric((worker.device, "to_device"), worker.usage["moved"])
            num_bytes = _resident_bytes(worker.pid)
            if num_bytes is not None:
                memory.add_metric((worker.device,), num_bytes)
        yield from (workers, memory, vram, resident, moved)


def router(context: Context) -> APIRouter:
    """`/metrics`, fed by the engine from now on."""
    routes = APIRouter(tags=["Health"])
    # A time beside every count, of no use to a query.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    metrics = Metrics(context.engine)
    context.engine.on_event.append(metrics.observe)

    @routes.get("/metrics", response_class=Response)
    async def get_metrics() -> Response:
        """Counters, histograms and gauges in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return routes


def _gauge(name: str, text: str, value: float, **labels: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"flux_nf4_{name}", text, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), value)
    return family


def _resident_bytes(pid: int | None) -> int | None:
    """The main memory of a process; None where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    lines = (line.split() for line in status.splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[0] == "VmRSS:"), None)
