import asyncio
import sys

import pytest

from flux_nf4.cli import ray_service
from flux_nf4.cli.serve import ServeOptions, cluster_settings, run
from flux_nf4.cluster.service import Front
from flux_nf4.errors import InputError
from flux_nf4.server.engine import EngineSettings
from flux_nf4.server.settings import ServeSettings

KEY = "a-key-that-nobody-guesses"


@pytest.fixture
def application(ray, monkeypatch, tmp_path):
    """What KubeRay imports, with settings in variables."""
    monkeypatch.chdir(tmp_path)
    ray.serve.ingress = lambda: lambda target: target
    values = {"API_KEY": KEY, "DEVICE": "cpu", "MAX_REPLICAS": "3", "DRAIN_TIMEOUT": "7"}
    for name, value in values.items():
        monkeypatch.setenv(f"FLUX_NF4_{name}", value)
    return ray_service.application({})


def test_there_is_one_front_before_the_replicas(application):
    _, num_replicas, replicas = application.arguments

    assert application.options["num_replicas"] == 1
    assert (num_replicas, replicas.options["name"]) == (3, "replica")


def test_the_front_has_time_to_drain(application):
    assert application.options["graceful_shutdown_timeout_s"] == 7


def test_no_key_travels_through_the_cluster(application):
    read_settings, *others = application.arguments

    assert KEY not in repr(others)
    assert read_settings()[0].api_keys == (KEY,)


class UnservedFront(Front):
    def __del__(self):
        """Ray Serve awaits the real one, and nobody else can."""


def test_the_front_serves_nobody_without_a_key():
    front = UnservedFront.__new__(UnservedFront)
    starting = front.__init__(lambda: (ServeSettings(), EngineSettings()), 1, None)

    with pytest.raises(InputError, match="no API key is set"):
        asyncio.run(starting)


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(InputError, match=r"`ray.* is not installed") as caught:
        run(ServeOptions(ray=True))

    assert "flux-nf4[ray]" in caught.value.hint


def test_options_reach_the_cluster():
    options = ServeOptions(
        ray=True, ray_address="auto", min_replicas=2, max_replicas=9, drain_timeout=5
    )

    settings = cluster_settings(options)

    assert (settings.address, settings.min_replicas, settings.max_replicas) == ("auto", 2, 9)
    assert settings.drain_timeout_s == 5
