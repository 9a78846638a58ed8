"""What a server is told at its start; nothing here changes while it runs."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from flux_nf4.errors import InputError

SdapiCfg: TypeAlias = Literal["auto", "ignore", "true", "guidance"]

# OpenAI's qualities in steps. `auto` takes the model's own number, and so does every quality of a
# model that was distilled for a few steps.
QUALITY_STEPS = {"low": 10, "medium": 20, "high": 28, "xhigh": 40, "max": 50}
MAX_IMAGES_PER_REQUEST = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Where to listen, whom to answer, and how much one request may ask for.

    `max_pixels` limits an image to be drawn, `max_upload_pixels` one that is sent.
    `max_megapixel_steps` limits a request: images x megapixels x steps, twice that with true CFG.
    `max_rate` and `max_work_rate` limit the requests and the megapixel steps of a key in a minute;
    what waits for longer than `queue_timeout_s` is given up. None is no limit.
    `api_keys` empty: whoever reaches the port is served. `lock_memory`: not even a single user may
    set the workers' memory.

    Raises:
        InputError: it would serve strangers without a key, or a name is not one.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    insecure: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    served_model_names: tuple[str, ...] = ()
    strict_model: bool = False
    max_pixels: int = 2048 * 2048
    max_upload_pixels: int = 4096 * 4096
    max_megapixel_steps: float = 1200.0
    max_rate: float | None = None
    max_work_rate: float | None = None
    queue_timeout_s: float | None = None
    max_json_bytes: int = 1_000_000
    max_upload_bytes: int = 25_000_000
    max_buffered_bytes: int = 250_000_000  # of all requests that are not answered yet
    max_connections: int = 1000
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    drain_timeout_s: float = 60.0
    keep_alive_s: float = 15.0  # between the comments that keep an event stream open
    link_lifetime_s: float = 3600.0
    sdapi_cfg: SdapiCfg = "auto"
    log_prompts: bool = False
    lock_memory: bool = False

    def __post_init__(self) -> None:
        if not (self.api_keys or self.insecure or self.is_loopback):
            raise InputError(
                f"`{self.host}` can be reached by others, and no API key is set",
                hint="give `--api-key-file FILE` or FLUX_NF4_API_KEY, listen on `127.0.0.1`, or "
                "say `--insecure` where only trusted machines reach the port",
            )
        for origin in self.cors_origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise InputError(
                    f"`--cors-origin` must be like `https://example.org`, got `{origin}`"
                )

    @property
    def lets_memory_change(self) -> bool:
        """Whether clients may set the workers' memory: where one person alone is served."""
        is_one_user = len(self.api_keys) == 1 or (not self.api_keys and self.is_loopback)
        return is_one_user and not self.lock_memory

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the port."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
