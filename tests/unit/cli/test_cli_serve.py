import asyncio
import base64
import json
import logging
import os
import signal
import socket
import subprocess
import sys

import httpx2
import pytest
from server_fakes import fake_capabilities

from flux_nf4.cli import serve
from flux_nf4.cli.options import parameters
from flux_nf4.cli.serve import ServeOptions
from flux_nf4.cli.server_settings import ServerSettings
from flux_nf4.cli.settings import read_options
from flux_nf4.errors import ModelNotFoundError
from flux_nf4.pipeline.image_metadata import read_image
from flux_nf4.server import listening

KEY = "a-key-that-nobody-guesses"


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    loggers = [logging.getLogger(name) for name in ("", "flux_nf4", "uvicorn")]
    before = [(logger, logger.level, logger.handlers) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.handlers = handlers
        logger.setLevel(level)


@pytest.fixture
def served(monkeypatch):
    """What `serve` was called with, in place of serving."""
    calls = []

    async def pretend(settings, engine, listener, *, on_ready, on_stopping):
        calls.append((settings, engine.settings))
        engine.capabilities = fake_capabilities()
        on_ready()
        await asyncio.sleep(0)
        on_stopping()

    monkeypatch.setattr(listening, "serve", pretend)
    return calls


def run(flux, *options):
    return flux("serve", "--port", "0", *options)


def test_it_says_where_it_listens_what_it_serves_and_how_to_stop_it(flux, served):
    ended = run(flux)

    assert ended.exit_code == 0
    assert ended.out == ""
    assert "serves `demo`" in ended.err
    assert "page  http://127.0.0.1:" in ended.err
    assert "stop  Ctrl-C" in ended.err
    assert "ready after" in ended.err
    assert "licence of the model: Apache-2.0" in ended.err


def test_a_log_of_json_is_json_from_the_first_line(flux, served):
    ended = run(flux, "--log-format", "json")

    lines = [json.loads(line) for line in ended.err.splitlines()]
    assert "serves `demo`" in lines[0]["message"]


def test_options_reach_the_server(flux, served):
    run(
        flux,
        *("--served-model-name", "a, b", "--strict-model", "--allowed-host", "x,y"),
        *("--cors-origin", "https://a.example", "--max-queue", "3", "--max-pixels", "1000000"),
        *("--max-work", "50", "--step-timeout", "7", "--drain-timeout", "9", "--device", "cpu"),
        *("--max-per-key", "2", "--durable", "queue.db", "--sdapi-cfg", "true", "--log-prompts"),
        *("--lock-memory", "--no-warm-up"),
    )

    ((settings, engine),) = served
    assert (settings.served_model_names, settings.strict_model) == (("a", "b"), True)
    assert (settings.allowed_hosts, settings.cors_origins) == (("x", "y"), ("https://a.example",))
    assert (settings.max_pixels, settings.max_megapixel_steps) == (1_000_000, 50)
    assert (settings.drain_timeout_s, settings.sdapi_cfg) == (9, "true")
    assert (settings.log_prompts, settings.lock_memory) == (True, True)
    assert (engine.max_queue, engine.step_timeout_s, engine.device) == (3, 7, "cpu")
    assert (engine.max_running_per_owner, engine.warm_up) == (2, False)
    assert engine.journal.name == "queue.db"


@pytest.mark.parametrize("name", sorted(each.name for each in parameters(ServerSettings)))
def test_every_option_may_come_from_a_variable(name):
    samples = {int: "4096", float: "2.5", bool: "true", str: "text"}
    parameter = next(each for each in parameters(ServerSettings) if each.name == name)
    kind = parameter.kind
    text = kind[-1] if isinstance(kind, tuple) else samples[kind]
    options = read_options(ServeOptions, {}, environment={f"FLUX_NF4_{name.upper()}": text})

    assert getattr(options, name) != parameter.default


def test_an_option_may_come_from_the_settings_file(folder, flux, served):
    (folder / "flux-nf4.toml").write_text("max-queue = 5\nsize = '256x256'\n")
    run(flux)

    assert served[0][1].max_queue == 5


@pytest.mark.parametrize(
    "option", [("--ray-address", "auto"), ("--min-replicas", "2"), ("--max-replicas", "3")]
)
def test_replicas_without_ray_are_refused(flux, served, option):
    ended = run(flux, *option)

    assert (ended.exit_code, served) == (2, [])
    assert ended.err.endswith("hint: add `--ray`\n")


# ---- keys ---------------------------------------------------------------------------------------


def test_keys_come_from_a_file_one_a_line(folder, flux, served):
    (folder / "keys").write_text(f"# for alice\n{KEY}1\n\n  {KEY}2\n")
    run(flux, "--api-key-file", "keys")

    assert served[0][0].api_keys == (f"{KEY}1", f"{KEY}2")


def test_keys_come_from_the_environment(flux, served, monkeypatch):
    monkeypatch.setenv("FLUX_NF4_API_KEY", f"{KEY}1,{KEY}2")
    run(flux)

    assert served[0][0].api_keys == (f"{KEY}1", f"{KEY}2")


@pytest.mark.parametrize("text", ["", "short", "# only a remark\n", "with\tsixteen\tcharacters\t"])
def test_a_file_without_a_proper_key_is_refused(folder, flux, served, text):
    (folder / "keys").write_text(text)
    ended = run(flux, "--api-key-file", "keys")

    assert ended.exit_code == 2
    assert served == []


def test_a_key_file_that_is_not_there_is_told(flux, served):
    ended = run(flux, "--api-key-file", "keys")

    assert (ended.exit_code, "`keys`" in ended.err) == (2, True)


# ---- what stops it from starting ----------------------------------------------------------------


def test_it_does_not_serve_others_without_a_key(flux, served):
    ended = run(flux, "--host", "0.0.0.0")

    assert ended.exit_code == 2
    assert "--api-key-file" in ended.err
    assert "--insecure" in ended.err


def test_without_a_key_it_serves_others_only_when_told_to_and_says_so(flux, served):
    assert "there is no API key" in run(flux, "--host", "0.0.0.0", "--insecure").err


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("0.0.0.0", "http://localhost:"),
        ("127.0.0.1", "http://127.0.0.1:"),
        ("::1", "http://[::1]:"),
    ],
)
def test_the_address_that_is_shown_can_be_opened(flux, served, host, shown):
    assert shown in run(flux, "--host", host, "--insecure").err


def test_a_port_in_use_is_an_error_of_usage(flux, served):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = flux("serve", "--port", str(port))

    assert ended.exit_code == 2
    assert f"port {port} of `127.0.0.1` is in use" in ended.err


def test_a_model_that_is_not_there_is_told_before_anything_starts(flux, served):
    ended = run(flux, "-m", "no-such-file.safetensors")

    assert ended.exit_code == ModelNotFoundError.exit_code
    assert served == []


def test_without_its_libraries_it_says_what_to_install(flux, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    ended = run(flux)

    assert ended.exit_code == 2
    assert "pip install 'flux-nf4[serve]'" in ended.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_end_that_cut_something_short_has_the_signals_exit_code(
    flux, served, monkeypatch, number, code
):
    async def cut_short(*_, **__):
        return number

    monkeypatch.setattr(listening, "serve", cut_short)

    assert run(flux).exit_code == code


# ---- for real -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory):
    """The address of a server of the demo model, which must end well when it is told to stop."""
    own = {name: text for name, text in os.environ.items() if not name.startswith("FLUX_NF4_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "flux_nf4", "serve", "--port", "0", "--device", "cpu"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path_factory.mktemp("served"),
        env=own | {"OMP_NUM_THREADS": "1"},
    )
    lines = iter(process.stderr.readline, "")
    url = next(line.split()[1] for line in lines if line.startswith("  page"))
    assert any(line.startswith("ready after") for line in lines)
    yield url
    process.terminate()
    process.communicate(timeout=60)
    if sys.platform != "win32":
        assert process.returncode == 0


def draw(url, prompt):
    body = {"prompt": prompt, "size": "64x64", "num_inference_steps": 2, "seed": 1}
    return httpx2.post(f"{url}v1/images/generations", json=body, timeout=60)


def test_the_demo_model_draws_for_clients(demo_server):
    (image,) = draw(demo_server, "a red apple").json()["data"]

    assert read_image(base64.b64decode(image["b64_json"])).settings.prompt == "a red apple"


def test_a_prompt_that_the_model_cannot_read_whole_is_told(demo_server):
    told = draw(demo_server, "word " * 600).json()

    assert told["x_prompt_truncated"] is True
    assert "tokens" in told["warnings"][0]


def test_what_serves_imports_no_torch():
    code = (
        "import sys, flux_nf4.server.listening, flux_nf4.server.engine;"
        "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_the_module_that_is_imported_for_help_imports_no_web_framework():
    code = "import sys, flux_nf4.cli.serve; print('fastapi' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert serve.VERB.name == "serve"
    assert done.stdout.strip() == "False"
