"""Replicas on Ray Serve: a cluster to run them in, as many as there is work for, and their end.

No HTTP server of Ray's, no dashboard. The server's own parent process takes the requests, with all
its limits, and speaks to the replicas through a handle.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import logging
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flux_nf4.cluster.engine import ClusterEngine
from flux_nf4.cluster.replica import Replica
from flux_nf4.errors import FluxNF4Error, InputError

if TYPE_CHECKING:
    from flux_nf4.server.status import EngineSettings

APPLICATION = "flux-nf4"
_DEPLOYMENT = "replica"
_CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """Which cluster, and how many replicas.

    `address` None is a cluster of this machine alone, which ends with the server; `auto` is the
    one that this machine belongs to. `max_replicas` None: one for each GPU, or for every second
    CPU where there is none.

    Raises:
        InputError: the least are more than the most.
    """

    address: str | None = None
    min_replicas: int = 1
    max_replicas: int | None = None
    # A queue that lasts starts a replica; nothing to do for so long ends one.
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 300.0
    drain_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise InputError(
                f"`--min-replicas {self.min_replicas}` is more than "
                f"`--max-replicas {self.max_replicas}`"
            )


def connect(settings: ClusterSettings) -> None:
    """Join the cluster, or start one; to be called before the server listens.

    Raises:
        FluxNF4Error: there is none at the address.
    """
    import ray
    import ray.serve

    for name in ("ray", "ray.serve"):  # which set up logs of their own
        log = logging.getLogger(name)
        log.handlers, log.propagate = [], True
        log.setLevel(logging.WARNING)
    try:
        if settings.address not in (None, "auto"):
            # Ray itself would try for a quarter of an hour.
            host, _, port = settings.address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        ray.init(
            address=settings.address or "local",
            namespace=APPLICATION,
            log_to_driver=False,
            configure_logging=False,
            include_dashboard=None if settings.address else False,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise FluxNF4Error(
            f"no Ray cluster can be reached at `{settings.address or 'this machine'}`: {error}",
            hint="`ray status` says whether there is one; without `--ray-address` one is started",
        ) from error


def disconnect(settings: ClusterSettings) -> None:
    """End the replicas, which are idle by now, and what else this server started.

    In this order: `serve.shutdown` cuts what is running, `serve.delete` lets it come to its end.
    """
    import ray
    from ray import serve

    serve.delete(APPLICATION)
    # Ray prints that its controller was killed, which it does itself.
    with contextlib.redirect_stdout(io.StringIO()):
        if settings.address is None:
            serve.shutdown()
        ray.shutdown()


def cluster_engine(settings: EngineSettings, cluster: ClusterSettings) -> ClusterEngine:
    """An engine that draws on the connected cluster; starting it starts the replicas."""
    num_replicas, replicas = replicas_for(settings, cluster)

    def run() -> Any:
        from ray import serve

        serve.start(proxy_location="Disabled")
        target = serve.RunTarget(replicas, name=APPLICATION, route_prefix=None)
        return serve.run_many([target], wait_for_applications_running=False)[0]

    async def deploy() -> Any:
        return await asyncio.to_thread(run)

    return ClusterEngine(settings, num_slots=num_replicas, deploy=deploy)


def replicas_for(settings: EngineSettings, cluster: ClusterSettings) -> tuple[int, Any]:
    """How many replicas there may be, and their deployment, bound.

    Raises:
        InputError: Ray chooses devices, and the settings name one.
    """
    import ray
    from ray import serve

    if settings.device not in ("auto", "all", "cuda", "cpu"):
        raise InputError(
            f"with `--ray` the device is `cpu` or `cuda`, got `{settings.device}`",
            hint="Ray gives each replica a device of its own",
        )
    resources = ray.cluster_resources()
    num_gpus = 0 if settings.device == "cpu" else int(resources.get("GPU", 0))
    if settings.device == "cuda" and not num_gpus:
        raise InputError("the Ray cluster has no GPU", hint="`--device cpu` does without")
    device = "cuda" if num_gpus else "cpu"
    num_replicas = cluster.max_replicas or max(
        cluster.min_replicas, num_gpus or int(resources.get("CPU", 1)) // 2
    )
    deployment = serve.deployment(
        name=_DEPLOYMENT,
        max_ongoing_requests=1,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(device == "cuda")},
        graceful_shutdown_timeout_s=cluster.drain_timeout_s,
        health_check_period_s=5,
        health_check_timeout_s=30,
        autoscaling_config={
            "min_replicas": cluster.min_replicas,
            "max_replicas": num_replicas,
            "target_ongoing_requests": 1,
            "upscale_delay_s": cluster.upscale_delay_s,
            "downscale_delay_s": cluster.downscale_delay_s,
        },
    )(Replica)
    return num_replicas, deployment.bind(dataclasses.replace(settings, device=device, journal=None))
