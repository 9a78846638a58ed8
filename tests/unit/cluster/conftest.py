"""A stand-in for Ray, which is large; benchmarks/ray_chaos.py asks the real one."""

import sys
from types import ModuleType

import pytest


class RayError(Exception):
    pass


class RayServeException(Exception):  # noqa: N818
    pass


class Deployment:
    """What `serve.deployment(...)(Replica).bind(...)` gives: all that was said."""

    def __init__(self, target, options):
        self.target = target
        self.options = options
        self.arguments = ()

    def bind(self, *arguments):
        self.arguments = arguments
        return self


@pytest.fixture
def ray(monkeypatch):
    """The module; `calls` has what was called, in its order, with the named arguments."""
    modules = {
        name: ModuleType(name)
        for name in ("ray", "ray.serve", "ray.exceptions", "ray.serve.exceptions")
    }
    ray, serve = modules["ray"], modules["ray.serve"]
    modules["ray.exceptions"].RayError = ray.RayError = RayError
    modules["ray.serve.exceptions"].RayServeException = RayServeException
    ray.serve, ray.calls, ray.resources = serve, [], {"CPU": 8.0}
    ray.cluster_resources = lambda: ray.resources

    def noted(name):
        return lambda *arguments, **more: ray.calls.append((name, arguments, more))

    ray.init, ray.shutdown = noted("init"), noted("shutdown")
    serve.start, serve.delete, serve.shutdown = noted("start"), noted("delete"), noted("serve off")
    serve.deployment = lambda **options: lambda target: Deployment(target, options)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return ray
