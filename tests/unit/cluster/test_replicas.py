import pytest

from flux_nf4.cluster.replicas import (
    ClusterSettings,
    connect,
    disconnect,
    replicas_for,
)
from flux_nf4.errors import FluxNF4Error, InputError
from flux_nf4.server.engine import EngineSettings


def replicas(device="auto", **cluster):
    return replicas_for(EngineSettings(device=device), ClusterSettings(**cluster))


def test_there_is_a_replica_for_each_gpu(ray):
    ray.resources["GPU"] = 3.0

    num_replicas, deployment = replicas()

    assert num_replicas == 3
    assert deployment.options["ray_actor_options"]["num_gpus"] == 1
    assert deployment.arguments[0].device == "cuda"


def test_without_a_gpu_there_is_a_replica_for_every_second_cpu(ray):
    num_replicas, deployment = replicas()

    assert num_replicas == 4
    assert deployment.options["ray_actor_options"]["num_gpus"] == 0
    assert deployment.arguments[0].device == "cpu"


def test_there_are_as_many_replicas_as_was_said(ray):
    num_replicas, deployment = replicas("cpu", min_replicas=2, max_replicas=5)

    assert num_replicas == 5
    scaling = deployment.options["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (2, 5)


def test_a_replica_draws_one_job_at_a_time(ray):
    assert replicas()[1].options["max_ongoing_requests"] == 1


def test_replicas_share_no_journal(ray, tmp_path):
    settings = EngineSettings(device="cpu", journal=tmp_path / "queue.db")

    _, deployment = replicas_for(settings, ClusterSettings())

    assert deployment.arguments[0].journal is None


@pytest.mark.parametrize("device", ["cuda:1", "tpu", "cuda"])
def test_a_device_that_ray_cannot_give_is_refused(ray, device):
    with pytest.raises(InputError, match=r"`--ray`|no GPU"):
        replicas(device)


def test_the_least_are_not_more_than_the_most():
    with pytest.raises(InputError, match="`--min-replicas 3`"):
        ClusterSettings(min_replicas=3, max_replicas=2)


def test_rays_dashboard_and_http_stay_off(ray):
    connect(ClusterSettings())

    ((_, _, said),) = ray.calls
    assert said["address"] == "local"
    assert said["include_dashboard"] is False


def test_a_cluster_that_is_not_there_is_told(ray):
    def fail(**_):
        raise ConnectionError("nobody answers")

    ray.init = fail

    with pytest.raises(FluxNF4Error, match="`auto`: nobody answers"):
        connect(ClusterSettings(address="auto"))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1", "no address"])
def test_an_address_where_nobody_listens_is_told_at_once(ray, address):
    with pytest.raises(FluxNF4Error, match=f"`{address}`"):
        connect(ClusterSettings(address=address))

    assert ray.calls == []


def test_what_runs_comes_to_its_end_before_ray_does(ray):
    disconnect(ClusterSettings())

    assert [name for name, *_ in ray.calls] == ["delete", "serve off", "shutdown"]


def test_in_a_cluster_of_others_their_applications_stay(ray):
    disconnect(ClusterSettings(address="auto"))

    assert [name for name, *_ in ray.calls] == ["delete", "shutdown"]
