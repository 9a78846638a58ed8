"""The settings of `serve`, and those that it shares with `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flux_nf4.cli.options import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Which model, and where it runs."""

    model: str | None = setting(
        "-m",
        "--model",
        metavar="PATH",
        help="checkpoint file or folder [`demo`, built in]",
        group="Model",
    )
    device: str = setting(
        "--device",
        metavar="NAME",
        default="auto",
        help="`cpu`, `cuda`, `cuda:1`, ... [auto]",
        group="Model",
    )
    vram: str | None = setting(
        "--vram",
        metavar="SIZE",
        help="device memory to stay within: 6GB, ... [what is free]",
        group="Model",
    )
    ram: str | None = setting(
        "--ram",
        metavar="SIZE",
        help="main memory for weights [what is free, less 2 GiB]",
        group="Model",
    )
    arithmetic: Literal["auto", "bf16", "fp8", "int8"] = setting(
        "--arithmetic",
        metavar="NAME",
        default="bf16",
        help="`bf16` (exact), `fp8`, `int8`, or `auto` [bf16]",
        group="Model",
    )
    attention: Literal["exact", "fp8", "int8"] = setting(
        "--attention",
        metavar="NAME",
        default="exact",
        help="`exact`; in 8 bits: `fp8`, `int8` [exact]",
        group="Model",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings(ModelSettings):
    """How to serve: each field is a flag, a variable and a key."""

    device: str = setting(
        "--device",
        metavar="NAME",
        default="auto",
        help="`cpu`, `cuda:1`, ..., or `all` GPUs at once [auto]",
        group="Model",
    )
    served_model_name: str | None = setting(
        "--served-model-name",
        metavar="A,B",
        help="what clients call it: any of these [its own name]",
        group="Model",
    )
    strict_model: bool = setting(
        "--strict-model",
        default=False,
        help="refuse requests that name another model",
        group="Model",
    )
    lock_memory: bool = setting(
        "--lock-memory",
        default=False,
        help="forbid the page to change `--vram`",
        group="Model",
    )
    no_warm_up: bool = setting(
        "--no-warm-up",
        default=False,
        help="ready sooner; on a GPU the first image is slower",
        group="Model",
    )
    host: str = setting(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="where to listen; `0.0.0.0`: everywhere [127.0.0.1]",
        group="Address",
    )
    port: int = setting(
        "--port",
        metavar="N",
        default=8000,
        minimum=0,
        maximum=65_535,
        help="port to listen on; 0: any that is free [8000]",
        group="Address",
    )
    api_key_file: str | None = setting(
        "--api-key-file",
        metavar="FILE",
        help="keys, one a line; or FLUX_NF4_API_KEY [no key]",
        group="Address",
    )
    insecure: bool = setting(
        "--insecure",
        default=False,
        help="let other machines in without a key",
        group="Address",
    )
    allowed_host: str | None = setting(
        "--allowed-host",
        metavar="A,B",
        help="names under which clients reach it [localhost]",
        group="Address",
    )
    cors_origin: str | None = setting(
        "--cors-origin",
        metavar="A,B",
        help="other sites whose pages may use it [none]",
        group="Address",
    )
    max_queue: int = setting(
        "--max-queue",
        metavar="N",
        default=32,
        minimum=1,
        maximum=1_000_000,
        help="requests that may wait [32]",
        group="Limits",
    )
    max_per_key: int | None = setting(
        "--max-per-key",
        metavar="N",
        minimum=1,
        maximum=1_000_000,
        help="requests of one key drawn at a time [no limit]",
        group="Limits",
    )
    max_pixels: int = setting(
        "--max-pixels",
        metavar="N",
        default=2048 * 2048,
        minimum=64 * 64,
        help="largest image [4194304: 2048 x 2048]",
        group="Limits",
    )
    max_work: float = setting(
        "--max-work",
        metavar="X",
        default=1200.0,
        minimum=0.001,
        help="largest request: images x megapixels x steps [1200]",
        group="Limits",
    )
    rate: float | None = setting(
        "--rate",
        metavar="X",
        minimum=0.001,
        help="requests of one key in a minute [no limit]",
        group="Limits",
    )
    work_rate: float | None = setting(
        "--work-rate",
        metavar="X",
        minimum=0.001,
        help="megapixels x steps of one key in a minute [no limit]",
        group="Limits",
    )
    queue_timeout: float | None = setting(
        "--queue-timeout",
        metavar="S",
        minimum=0.01,
        maximum=86_400,
        help="give up requests that wait for longer [never]",
        group="Limits",
    )
    step_timeout: float | None = setting(
        "--step-timeout",
        metavar="S",
        minimum=0.01,
        maximum=86_400,
        help="replace a worker silent for so long [120; CPU 600]",
        group="Limits",
    )
    drain_timeout: float = setting(
        "--drain-timeout",
        metavar="S",
        default=60.0,
        minimum=0,
        maximum=86_400,
        help="time to finish what waits when stopped [60]",
        group="Limits",
    )
    log_format: Literal["text", "json"] = setting(
        "--log-format",
        metavar="text|json",
        default="text",
        help="how log lines are written [text]",
        group="Output",
    )
    log_prompts: bool = setting(
        "--log-prompts",
        default=False,
        help="write prompts into the log",
        group="Output",
    )
    durable: str | None = setting(
        "--durable",
        metavar="FILE",
        help="keep unfinished requests here over a restart",
        group="Limits",
    )
    sdapi_cfg: Literal["auto", "ignore", "true", "guidance"] = setting(
        "--sdapi-cfg",
        metavar="WORD",
        default="auto",
        help="A1111's `cfg_scale`: `ignore`, `true`, `guidance` [auto]",
        group="Limits",
    )
    ray: bool = setting(
        "--ray",
        default=False,
        help="draw on replicas of Ray Serve, on many hosts",
        group="Cluster",
    )
    ray_address: str | None = setting(
        "--ray-address",
        metavar="HOST:PORT",
        help="the cluster, or `auto` [a new one, here]",
        group="Cluster",
    )
    min_replicas: int = setting(
        "--min-replicas",
        metavar="N",
        default=1,
        minimum=1,
        maximum=10_000,
        help="replicas to keep without work, too [1]",
        group="Cluster",
    )
    max_replicas: int | None = setting(
        "--max-replicas",
        metavar="N",
        minimum=1,
        maximum=10_000,
        help="most replicas, when there is much work [one a GPU]",
        group="Cluster",
    )
