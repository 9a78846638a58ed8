"""The settings of `serve`, and those that it shares with `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flux_nf4.cli.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Which model, and where it runs."""

    model: str | None = option(
        "-m",
        "--model",
        metavar="PATH",
        help="checkpoint file or folder [`demo`, built in]",
        group="Model",
        setting=True,
    )
    device: str = option(
        "--device",
        metavar="NAME",
        default="auto",
        help="`cpu`, `cuda`, `cuda:1`, ... [auto]",
        group="Model",
        setting=True,
    )
    vram: str | None = option(
        "--vram",
        metavar="SIZE",
        help="of the card's memory: 6GB, ... [what is free]",
        group="Model",
        setting=True,
    )
    ram: str | None = option(
        "--ram",
        metavar="SIZE",
        help="of main memory, for weights [what is free, less 2 GiB]",
        group="Model",
        setting=True,
    )
    arithmetic: Literal["auto", "bf16", "fp8", "int8"] = option(
        "--arithmetic",
        metavar="NAME",
        default="bf16",
        help="`bf16` (exact), `fp8`, `int8`, or `auto` [bf16]",
        group="Model",
        setting=True,
    )
    attention: Literal["exact", "int8"] = option(
        "--attention",
        metavar="NAME",
        default="exact",
        help="`exact`, or `int8` with sageattention [exact]",
        group="Model",
        setting=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings(ModelSettings):
    """How to serve: each field is a flag, a variable and a key."""

    served_model_name: str | None = option(
        "--served-model-name",
        metavar="A,B",
        help="what clients call it [its own name]",
        group="Model",
        setting=True,
    )
    strict_model: bool = option(
        "--strict-model",
        default=False,
        help="refuse requests that name another model",
        group="Model",
        setting=True,
    )
    lock_memory: bool = option(
        "--lock-memory",
        default=False,
        help="the page may not change `--vram`",
        group="Model",
        setting=True,
    )
    no_warm_up: bool = option(
        "--no-warm-up",
        default=False,
        help="ready sooner; on a GPU the first image is slower",
        group="Model",
        setting=True,
    )
    host: str = option(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="`0.0.0.0`: all that reach this machine [127.0.0.1]",
        group="Address",
        setting=True,
    )
    port: int = option(
        "--port",
        metavar="N",
        default=8000,
        minimum=0,
        maximum=65_535,
        help="0: any that is free [8000]",
        group="Address",
        setting=True,
    )
    api_key_file: str | None = option(
        "--api-key-file",
        metavar="FILE",
        help="one key a line; or FLUX_NF4_API_KEY [no key]",
        group="Address",
        setting=True,
    )
    insecure: bool = option(
        "--insecure",
        default=False,
        help="serve others than this machine without a key",
        group="Address",
        setting=True,
    )
    allowed_host: str | None = option(
        "--allowed-host",
        metavar="A,B",
        help="names under which it is reached [localhost]",
        group="Address",
        setting=True,
    )
    cors_origin: str | None = option(
        "--cors-origin",
        metavar="A,B",
        help="origins whose pages may use it [its own]",
        group="Address",
        setting=True,
    )
    max_queue: int = option(
        "--max-queue",
        metavar="N",
        default=32,
        minimum=1,
        maximum=1_000_000,
        help="requests that may wait [32]",
        group="Limits",
        setting=True,
    )
    max_per_key: int | None = option(
        "--max-per-key",
        metavar="N",
        minimum=1,
        maximum=1_000_000,
        help="of one key's requests drawn at the same time",
        group="Limits",
        setting=True,
    )
    max_pixels: int = option(
        "--max-pixels",
        metavar="N",
        default=2048 * 2048,
        minimum=64 * 64,
        help="of one image [4194304]",
        group="Limits",
        setting=True,
    )
    max_work: float = option(
        "--max-work",
        metavar="X",
        default=1200.0,
        minimum=0.001,
        help="of one request: images x megapixels x steps [1200]",
        group="Limits",
        setting=True,
    )
    rate: float | None = option(
        "--rate",
        metavar="X",
        minimum=0.001,
        help="requests of one key in a minute",
        group="Limits",
        setting=True,
    )
    work_rate: float | None = option(
        "--work-rate",
        metavar="X",
        minimum=0.001,
        help="megapixels x steps of one key in a minute",
        group="Limits",
        setting=True,
    )
    queue_timeout: float | None = option(
        "--queue-timeout",
        metavar="S",
        minimum=0.01,
        maximum=86_400,
        help="what waits for longer is given up",
        group="Limits",
        setting=True,
    )
    step_timeout: float | None = option(
        "--step-timeout",
        metavar="S",
        minimum=0.01,
        maximum=86_400,
        help="a worker silent for so long is replaced [120; CPU 600]",
        group="Limits",
        setting=True,
    )
    drain_timeout: float = option(
        "--drain-timeout",
        metavar="S",
        default=60.0,
        minimum=0,
        maximum=86_400,
        help="to finish what waits when it is stopped [60]",
        group="Limits",
        setting=True,
    )
    log_format: Literal["text", "json"] = option(
        "--log-format",
        metavar="text|json",
        default="text",
        help="of the lines on standard error [text]",
        group="Output",
        setting=True,
    )
    log_prompts: bool = option(
        "--log-prompts",
        default=False,
        help="write prompts into the log",
        group="Output",
        setting=True,
    )
    durable: str | None = option(
        "--durable",
        metavar="FILE",
        help="keep unfinished work here over a restart",
        group="Limits",
        setting=True,
    )
    sdapi_cfg: Literal["auto", "ignore", "true", "guidance"] = option(
        "--sdapi-cfg",
        metavar="WORD",
        default="auto",
        help="A1111's `cfg_scale`: `ignore`, `true`, `guidance` [auto]",
        group="Limits",
        setting=True,
    )
    ray: bool = option(
        "--ray",
        default=False,
        help="draw on replicas of Ray Serve, on many hosts",
        group="Cluster",
        setting=True,
    )
    ray_address: str | None = option(
        "--ray-address",
        metavar="HOST:PORT",
        help="its cluster, or `auto` [a new one, here]",
        group="Cluster",
        setting=True,
    )
    min_replicas: int = option(
        "--min-replicas",
        metavar="N",
        default=1,
        minimum=1,
        maximum=10_000,
        help="that are there without work too [1]",
        group="Cluster",
        setting=True,
    )
    max_replicas: int | None = option(
        "--max-replicas",
        metavar="N",
        minimum=1,
        maximum=10_000,
        help="when there is much [one a GPU]",
        group="Cluster",
        setting=True,
    )
