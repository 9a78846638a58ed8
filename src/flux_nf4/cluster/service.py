"""The whole server as an application of Ray Serve's, for clusters that run such (a RayService).

Ray's HTTP proxy takes the requests here. One *front* holds the queue and the jobs, as the server's
parent process does on one machine; it draws on the same replicas.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from flux_nf4.cluster.engine import ClusterEngine
from flux_nf4.cluster.replicas import ClusterSettings, replicas_for
from flux_nf4.server.app import build_app

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI

    from flux_nf4.server.settings import ServeSettings
    from flux_nf4.server.status import EngineSettings


class Front:
    """`read_settings` is called where the front runs, so that no key travels through the cluster.

    Raises:
        InputError: there is no key; the proxy listens to everybody.
    """

    async def __init__(  # type: ignore[misc]
        self,
        read_settings: Callable[[], tuple[ServeSettings, EngineSettings]],
        num_replicas: int,
        replicas: Any,
    ) -> None:
        settings, engine_settings = read_settings()
        self._settings = dataclasses.replace(settings, host="0.0.0.0")

        async def deployed() -> Any:
            return replicas

        self._engine = ClusterEngine(engine_settings, num_slots=num_replicas, deploy=deployed)
        await self._engine.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve, once."""
        return build_app(self._settings, self._engine)

    async def __del__(self) -> None:
        """Called by Ray Serve when the front's requests have ended, or had their time."""
        await self._engine.drain(self._settings.drain_timeout_s)
        await self._engine.stop()


def application(
    read_settings: Callable[[], tuple[ServeSettings, EngineSettings]], cluster: ClusterSettings
) -> Any:
    """The front and its replicas, bound; of one application, so that they come and go together."""
    from ray import serve

    settings, engine_settings = read_settings()
    num_replicas, replicas = replicas_for(engine_settings, cluster)
    front = serve.deployment(
        name="front",
        num_replicas=1,
        max_ongoing_requests=settings.max_connections,
        ray_actor_options={"num_cpus": 1},
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
    )(serve.ingress()(Front))
    return front.bind(read_settings, num_replicas, replicas)
