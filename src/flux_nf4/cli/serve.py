"""`flux-nf4 serve`: a server for programs and, in a browser, for people."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flux_nf4 import __version__
from flux_nf4.cli.console import print_plain
from flux_nf4.cli.paths import model_path, path_of, read_text
from flux_nf4.cli.server_settings import ServerSettings
from flux_nf4.cli.signals import EXIT_CODES
from flux_nf4.cli.verb import Verb, debug_option
from flux_nf4.errors import InputError, ModelNotFoundError
from flux_nf4.memory.amounts import parse_limit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flux_nf4.cluster.replicas import ClusterSettings
    from flux_nf4.server.engine import Engine, EngineSettings
    from flux_nf4.server.settings import ServeSettings

_log = logging.getLogger(__name__)
_MIN_KEY_CHARACTERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions(ServerSettings):
    """The options of `serve`."""

    debug: bool = debug_option()


def run(options: ServeOptions) -> int:
    """Serve until a signal says to stop; 0 when nothing was cut short."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401

        if options.ray:
            import ray.serve  # noqa: F401
    except ImportError as error:
        extra = "ray" if options.ray else "serve"
        raise InputError(
            f"`{error.name}` is not installed, which serving needs",
            hint=f"install it with `pip install 'flux-nf4[{extra}]'`",
        ) from error
    from flux_nf4.server import logs
    from flux_nf4.server.listening import bind, serve

    _check_replicas(options)
    settings, engine_settings = all_settings(options)
    logs.configure(options.log_format, secrets=settings.api_keys)
    # In a log of JSON nothing but JSON.
    say = print_plain if options.log_format == "text" else _log.info
    started = time.monotonic()

    def say_ready() -> None:
        model = engine.capabilities
        assert model is not None
        say(f"ready after {time.monotonic() - started:.1f} s: {model.model} on {model.device}")
        say(f"  licence of the model: {model.licence}")

    with (
        bind(settings.host, settings.port) as listener,
        _engine(options, engine_settings) as engine,
    ):
        for line in _where(settings, engine_settings, listener.getsockname()[1]):
            say(line)
        cut_short_by = asyncio.run(
            serve(
                settings,
                engine,
                listener,
                on_ready=say_ready,
                on_stopping=lambda: say("finishing what was begun; once more to stop now"),
            )
        )
    say("stopped")
    return 0 if cut_short_by is None else EXIT_CODES[cut_short_by]


def _check_replicas(options: ServeOptions) -> None:
    for name, is_given in (
        ("--ray-address", options.ray_address is not None),
        ("--min-replicas", options.min_replicas != 1),
        ("--max-replicas", options.max_replicas is not None),
    ):
        if is_given and not options.ray:
            raise InputError(
                f"`{name}` is for replicas on Ray, which is not asked for", hint="add `--ray`"
            )


@contextlib.contextmanager
def _engine(options: ServeOptions, settings: EngineSettings) -> Iterator[Engine]:
    """An engine on this machine, or before replicas that end with it."""
    from flux_nf4.server.engine import Engine

    if not options.ray:
        yield Engine(settings)
        return
    from flux_nf4.cluster import replicas

    cluster = cluster_settings(options)
    replicas.connect(cluster)
    try:
        yield replicas.cluster_engine(settings, cluster)
    finally:
        replicas.disconnect(cluster)


def _where(settings: ServeSettings, engine: EngineSettings, port: int) -> Iterator[str]:
    # The address that stands for all of a machine's own cannot be opened in a browser.
    host = "localhost" if settings.host in ("0.0.0.0", "::") else settings.host
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    yield f"flux-nf4 {__version__} serves `{engine.model or 'demo'}`"
    yield f"  page  {address}/"
    yield f"  APIs  {address}/v1 (OpenAI), {address}/sdapi (A1111); all of them: /docs"
    yield "  stop  Ctrl-C: finishes what was begun; twice: at once"
    if not settings.api_keys and not settings.is_loopback:
        yield "  note  there is no API key: whoever reaches this address may use it"


def all_settings(options: ServeOptions) -> tuple[ServeSettings, EngineSettings]:
    """What the server and its engine are told.

    Raises:
        InputError: the options contradict each other, or a key cannot be read.
        ModelNotFoundError: there is no such model.
    """
    return _settings(options), _engine_settings(options)


def _settings(options: ServeOptions) -> ServeSettings:
    from flux_nf4.server.settings import ServeSettings

    return ServeSettings(
        host=options.host,
        port=options.port,
        api_keys=_api_keys(options.api_key_file),
        insecure=options.insecure,
        allowed_hosts=_words(options.allowed_host),
        cors_origins=_words(options.cors_origin),
        served_model_names=_words(options.served_model_name),
        strict_model=options.strict_model,
        max_pixels=options.max_pixels,
        max_megapixel_steps=options.max_work,
        max_rate=options.rate,
        max_work_rate=options.work_rate,
        queue_timeout_s=options.queue_timeout,
        drain_timeout_s=options.drain_timeout,
        sdapi_cfg=options.sdapi_cfg,
        log_prompts=options.log_prompts,
        lock_memory=options.lock_memory,
    )


def _engine_settings(options: ServeOptions) -> EngineSettings:
    from flux_nf4.server.engine import EngineSettings

    model = model_path(options.model)
    if model is not None and not model.exists():
        raise ModelNotFoundError(
            f"there is no `{model}`", hint="`flux-nf4 pull` fetches a model; or leave `--model` out"
        )
    return EngineSettings(
        model=None if model is None else str(model),
        device=options.device,
        max_queue=options.max_queue,
        max_running_per_owner=options.max_per_key,
        step_timeout_s=options.step_timeout,
        vram=parse_limit(options.vram, "--vram"),
        ram=parse_limit(options.ram, "--ram"),
        arithmetic=options.arithmetic,
        attention=options.attention,
        warm_up=not options.no_warm_up,
        journal=None if options.durable is None else path_of(options.durable),
    )


def cluster_settings(options: ServeOptions) -> ClusterSettings:
    """Which cluster, and how many replicas.

    Raises:
        InputError: the least are more than the most.
    """
    from flux_nf4.cluster.replicas import ClusterSettings

    return ClusterSettings(
        address=options.ray_address,
        min_replicas=options.min_replicas,
        max_replicas=options.max_replicas,
        drain_timeout_s=options.drain_timeout,
    )


def _api_keys(file_name: str | None) -> tuple[str, ...]:
    """The keys in the file, one a line, and those in the environment.

    Raises:
        InputError: the file cannot be read or holds none, or a key is too short to be one.
    """
    keys = list(_words(os.environ.get("FLUX_NF4_API_KEY")))
    if file_name is not None:
        lines = read_text(file_name).splitlines()
        in_file = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not in_file:
            raise InputError(f"there is no API key in `{file_name}`", hint="write one a line")
        keys += in_file
    for key in keys:
        if len(key) < _MIN_KEY_CHARACTERS or not key.isprintable() or not key.isascii():
            raise InputError(
                f"an API key has {len(key)} characters, fewer than {_MIN_KEY_CHARACTERS}, or some "
                "that no key may have",
                hint="make one with `python -c 'import secrets; print(secrets.token_urlsafe())'`",
            )
    return tuple(keys)


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


VERB = Verb(
    name="serve",
    summary="Serve a web page, and the APIs of OpenAI and A1111.",
    options=ServeOptions,
    run=run,
    examples=("--host 0.0.0.0 --api-key-file keys.txt -m nf4.safetensors",),
)
