"""`flux_nf4.cli.ray_service:application`: what a RayService names as its `import_path`.

Its settings are those of `flux-nf4 serve`, in `FLUX_NF4_*` variables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flux_nf4.cli import serve
from flux_nf4.cli.settings import read_options
from flux_nf4.cluster import service

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flux_nf4.server.settings import ServeSettings
    from flux_nf4.server.status import EngineSettings


def application(_: Mapping[str, str]) -> Any:
    """The application, to be run by Ray Serve."""
    options = read_options(serve.ServeOptions, {})
    return service.application(_read_settings, serve.cluster_settings(options))


def _read_settings() -> tuple[ServeSettings, EngineSettings]:
    return serve.all_settings(read_options(serve.ServeOptions, {}))
