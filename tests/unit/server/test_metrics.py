import asyncio
import re

import httpx2
import pytest
from engines import finished, serving
from live_server import live_server
from prometheus_client import Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from server_fakes import FakeEngine, out_of_memory, wait_until

from flux_nf4.server.metrics import Metrics

PROMPT = "a very private lighthouse"

# What dashboards are promised: names, and the labels that each has beside those of a worker.
PROMISED = {
    "requests_total": {"api", "status", "finish_reason"},
    "requests_running": set(),
    "requests_waiting": set(),
    "request_duration_seconds": set(),
    "queue_seconds": set(),
    "first_preview_seconds": set(),
    "stage_seconds": {"stage"},
    "step_seconds": set(),
    "images_total": set(),
    "pixels_total": set(),
    "steps_total": set(),
    "admission_rejections_total": {"reason"},
    "cancelled_total": {"cause"},
    "oom_total": {"stage", "action"},
    "worker_restarts_total": {"reason"},
    "replays_total": set(),
    "vram_bytes": {"kind"},
    "host_bytes": set(),
    "offload_bytes_total": {"direction"},
    "weights_resident_bytes": set(),
    "lora_loaded": set(),
    "build_info": set(),
    "model_info": {"sha", "licence"},
}


def samples(text):
    """Every sample as `name{label=value}` -> number."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"flux_nf4_{name}", labels)


def scrape(live):
    return httpx2.get(f"{live.url}/metrics").text


def draw(live, **body):
    body = {"prompt": PROMPT, "steps": 3, "n_iter": 2} | body
    return httpx2.post(f"{live.url}/sdapi/v1/txt2img", json=body, timeout=30)


@pytest.fixture
def metrics():
    return Metrics(FakeEngine())


def test_a_job_is_counted_from_its_end_to_its_steps():
    with live_server() as live:
        draw(live)
        found = samples(scrape(live))

    end = "api=sdapi,finish_reason=done,status=done"
    assert found[f"flux_nf4_requests_total{{{end}}}"] == 1
    assert found["flux_nf4_request_duration_seconds_count{api=sdapi}"] == 1
    assert found["flux_nf4_queue_seconds_count"] == 1
    assert found["flux_nf4_steps_total"] == 6
    assert found["flux_nf4_step_seconds_count"] == 6


def test_the_state_is_read_when_it_is_asked_for():
    with live_server() as live:
        live.pull(live.engine.hold)
        for _ in range(2):
            httpx2.post(f"{live.url}/v1/jobs", json={"prompt": "a"}, timeout=30)
        wait_until(lambda: live.engine.status().num_running)
        found = samples(scrape(live))

    assert found["flux_nf4_requests_running"] == 1
    assert found["flux_nf4_requests_waiting"] == 1
    assert found["flux_nf4_ready"] == 1
    assert found["flux_nf4_workers{device=cpu,state=busy}"] == 1


def test_nothing_of_a_request_is_in_a_label():
    with live_server(api_keys=("k" * 20,)) as live:
        client = httpx2.Client(base_url=live.url, headers={"authorization": f"Bearer {'k' * 20}"})
        client.post("/v1/jobs", json={"prompt": PROMPT, "num_inference_steps": 1})
        job = live.engine.jobs(owner=next(iter(live.engine._jobs.values())).owner)[0]
        wait_until(lambda: job.is_finished)
        text = client.get("/metrics").text
        client.close()

    assert "lighthouse" not in text
    assert job.id not in text
    assert job.owner not in text
    assert "k" * 20 not in text


def test_metrics_need_the_key():
    with live_server(api_keys=("k" * 20,)) as live:
        assert httpx2.get(f"{live.url}/metrics").status_code == 401
        assert httpx2.get(f"{live.url}/metrics", auth=("u", "k" * 20)).status_code == 200


def test_before_the_model_is_loaded_there_is_no_model(metrics):
    engine = FakeEngine()
    engine.capabilities = None
    loading = Metrics(engine)

    assert value(metrics, "model_info", **model_labels(metrics)) == 1
    assert {"sha", "licence"} < set(model_labels(metrics))
    assert "flux_nf4_model_info" not in {family.name for family in loading.registry.collect()}


def model_labels(metrics):
    families = {family.name: family for family in metrics.registry.collect()}
    return families["flux_nf4_model_info"].samples[0].labels


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        ("it gave no sign of life for 120 s", "hang"),
        ("it was ended by SIGKILL: out of memory", "signal"),
        ("it exited with code 1: cuda:0", "exit"),
        ("it sent something that is no message: KeyError", "protocol"),
        ("anything else at all", "other"),
    ],
)
def test_a_lost_worker_is_counted_by_kind_and_not_by_its_last_words(metrics, reason, word):
    metrics.observe("worker_restarted", device="cpu", reason=reason)

    assert value(metrics, "worker_restarts_total", reason=word) == 1


@pytest.mark.parametrize(
    ("event", "facts", "name", "labels"),
    [
        ("rejected", {"reason": "queue_full"}, "admission_rejections_total", None),
        ("replayed", {"reason": "worker_lost"}, "replays_total", None),
        ("job_cancelled", {"cause": "client"}, "cancelled_total", None),
        ("first_preview", {"duration_s": 0.2}, "first_preview_seconds_count", {}),
        (
            "stage",
            {"stage": "text", "duration_s": 1},
            "stage_seconds_count",
            {"stage": "text_encode"},
        ),
        (
            "stage",
            {"stage": "decode", "duration_s": 1},
            "stage_seconds_count",
            {"stage": "vae_decode"},
        ),
        (
            "stage",
            {"stage": "save", "duration_s": 1},
            "stage_seconds_count",
            {"stage": "encode_image"},
        ),
        ("stage", {"stage": "?", "duration_s": 1}, "stage_seconds_count", {"stage": "other"}),
        ("image", {"width": 64, "height": 32}, "images_total", {}),
    ],
)
def test_an_event_of_the_engine_is_counted(metrics, event, facts, name, labels):
    metrics.observe(event, **facts)

    assert value(metrics, name, **(facts if labels is None else labels)) == 1


def test_pixels_are_counted(metrics):
    metrics.observe("image", width=64, height=32)

    assert value(metrics, "pixels_total") == 64 * 32


def test_an_unknown_event_is_passed_over(metrics):
    before = _own_lines(metrics)
    metrics.observe("something_new", anything=1)
    assert _own_lines(metrics) == before


def _own_lines(metrics):
    """What the metrics say but for the process's: its time and memory go on beside the test."""
    lines = generate_latest(metrics.registry).decode().splitlines()
    return [line for line in lines if line.startswith("flux_nf4_")]


def test_too_little_memory_is_counted_and_named():
    engine = FakeEngine()
    with live_server(engine) as live:
        engine.fail_next = out_of_memory()
        draw(live)
        found = samples(scrape(live))

    end = "api=sdapi,finish_reason=out_of_memory,status=failed"
    assert found[f"flux_nf4_requests_total{{{end}}}"] == 1


def test_a_workers_memory_is_told():
    async def claim():
        async with serving() as engine:
            await finished(engine)
            assert value(Metrics(engine), "host_bytes", device="cpu") > 10**6

    asyncio.run(claim())


def test_the_memory_of_a_worker_that_is_not_there_is_not_told(metrics):
    assert value(metrics, "host_bytes", device="cpu") is None


def test_a_devices_memory_is_told_as_the_last_job_left_it():
    async def claim():
        async with serving("planned") as engine:
            metrics = Metrics(engine)
            await finished(engine)
            kinds = ("budget", "peak")
            told = [value(metrics, "vram_bytes", device="cpu", kind=kind) for kind in kinds]
            assert told == [6, 5]
            assert value(metrics, "weights_resident_bytes", device="cpu") == 4
            way = {"direction": "to_device"}
            assert value(metrics, "offload_bytes_total", device="cpu", **way) == 3

    asyncio.run(claim())


@pytest.mark.parametrize(("prompt", "action"), [("fail", "failed"), ("notice", "shrunk")])
def test_memory_that_ran_out_is_counted_where_it_did(prompt, action):
    async def claim():
        async with serving() as engine:
            metrics = Metrics(engine)
            engine.on_event.append(metrics.observe)
            await finished(engine, prompt)
            assert value(metrics, "oom_total", stage="denoise", action=action) == 1

    asyncio.run(claim())


def test_names_follow_prometheus_conventions(metrics):
    names = {family.name for family in metrics.registry.collect()}
    ours = {name for name in names if not name.startswith("process_")}

    assert all(re.fullmatch(r"flux_nf4_[a-z_]+", name) for name in ours)


def labels_of(metrics):
    """Every name that is served, and its labels; of a counter that has none yet those to come."""
    labels = {}
    for family in metrics.registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        labels[name] = {label for sample in family.samples for label in sample.labels}
    for collector in vars(metrics).values():
        if isinstance(collector, Counter | Histogram):
            suffix = "_total" if isinstance(collector, Counter) else ""
            labels[collector._name + suffix] = set(collector._labelnames)
    return labels


def test_every_name_and_label_that_is_promised_is_served():
    async def claim():
        async with serving("planned") as engine:
            await finished(engine)
            return labels_of(Metrics(engine))

    served = asyncio.run(claim())
    for name, labels in PROMISED.items():
        assert labels <= served[f"flux_nf4_{name}"], name


def test_two_servers_do_not_add_up(metrics):
    other = Metrics(FakeEngine())
    metrics.observe("image", width=64, height=64)

    assert value(other, "images_total") == 0
