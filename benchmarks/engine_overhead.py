"""What the engine adds to a request over the pipeline: `python -m benchmarks.engine_overhead`.

The worker tells how long it was inside the pipeline; the rest of a job's time, from `submit` to
its end, is ours: queue, frames, shared memory, and the PNG with its metadata, which is told apart.
One thread, the demo model, medians after three requests of warm-up.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import statistics
import sys
import time

from flux_nf4.server import running
from flux_nf4.server.engine import Engine, EngineSettings
from flux_nf4.server.jobs import JobSpec

_WORKER = """
import sys, time
from flux_nf4.pipeline import generate as module
from flux_nf4.server import worker

def generate(*arguments, **more):
    events, inside_s = draw(*arguments, **more), 0.0
    while True:
        began_s = time.perf_counter()
        event = next(events, None)
        inside_s += time.perf_counter() - began_s
        if event is None:
            break
        yield event
    print("inside", inside_s, file=sys.stderr, flush=True)

draw, module.generate = module.generate, generate
sys.exit(worker.main())
"""
_SHAPES = ((64, 1, 60), (256, 4, 30), (256, 20, 15))  # size, steps, requests
_WARM_UP = 3


class _Inside(logging.Handler):
    """Collects what the worker prints."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: asyncio.Queue[float] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        _, found, seconds = record.getMessage().partition("inside ")
        if found:
            self.seconds.put_nowait(float(seconds))


async def measure() -> None:
    """Print a line of JSON for each shape."""
    inside, encoding = _Inside(), []
    log = logging.getLogger("flux_nf4.server.supervisor")
    log.addHandler(inside)
    log.setLevel(logging.INFO)
    encode = running.encode_png

    def timed_encode(*arguments):
        began_s = time.perf_counter()
        png = encode(*arguments)
        encoding.append(time.perf_counter() - began_s)
        return png

    running.encode_png = timed_encode
    engine = Engine(
        EngineSettings(device="cpu"), worker_command=[sys.executable, "-P", "-c", _WORKER]
    )
    began_s = time.perf_counter()
    await engine.start()
    await engine.wait_ready()
    print(json.dumps({"ready_s": round(time.perf_counter() - began_s, 2)}))
    await inside.seconds.get()  # the worker's own warm-up
    for size, steps, num_requests in _SHAPES:
        added_s = []
        for seed in range(num_requests):
            began_s = time.perf_counter()
            spec = JobSpec(
                prompt="a red apple", width=size, height=size, num_inference_steps=steps, seed=seed
            )
            await engine.submit(spec, owner="benchmark", api="jobs").wait()
            total_s = time.perf_counter() - began_s
            added_s.append(total_s - await inside.seconds.get() - encoding[-1])
        low, *_, high = statistics.quantiles(added_s[_WARM_UP:], n=5)
        print(
            json.dumps(
                {
                    "size": size,
                    "steps": steps,
                    "added_ms": round(1000 * statistics.median(added_s[_WARM_UP:]), 2),
                    "added_p20_p80_ms": [round(1000 * low, 2), round(1000 * high, 2)],
                    "png_ms": round(1000 * statistics.median(encoding[-num_requests:]), 2),
                }
            )
        )
    await engine.stop()
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"parent_peak_rss_mb": round(peak_mb, 1)}))


if __name__ == "__main__":
    asyncio.run(measure())
