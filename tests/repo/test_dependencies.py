import ast
import importlib.metadata
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from repository import ROOT, committed_files, named, pins, project

REQUIREMENTS = [
    Requirement(text)
    for texts in (project()["dependencies"], *project()["optional-dependencies"].values())
    for text in texts
    if not text.startswith("flux-nf4[")
]


def needed(name, extras=("",), seen=None):
    """Every package that `name` needs here, as its installed metadata say."""
    seen = set() if seen is None else seen
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        wanted = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras
        )
        child = canonicalize_name(requirement.name)
        if wanted and (child, *sorted(requirement.extras)) not in seen:
            seen.add((child, *sorted(requirement.extras)))
            needed(child, ("", *requirement.extras), seen)
    return {child for child, *_ in seen}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_requirement_is_pinned_within_its_bounds(requirement):
    pin = pins()[canonicalize_name(requirement.name)]

    assert Version(pin) in requirement.specifier


def test_all_that_the_requirements_need_is_pinned_too():
    # Which of NVIDIA's libraries come along depends on the build of torch, and is its own affair.
    ours = {
        name
        for name in needed("flux-nf4", ("", "serve", "dev"))
        if not name.startswith(("cuda-", "nvidia-"))
    }

    assert ours - set(pins()) == set()


def test_pins_are_sorted():
    assert list(pins()) == sorted(pins())


def imported_libraries(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module.split(".")[0]


# The name that is imported, where it is not the name that is installed.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cudnn": "nvidia-cudnn-frontend",
    "flux_nf4": "flux-nf4",
    "huggingface_hub": "huggingface-hub",
    "prometheus_client": "prometheus-client",
}


def test_the_package_imports_only_what_it_asks_for():
    extras = project()["optional-dependencies"]
    used = ("serve", "ray", "sage", "cudnn", "compare")
    texts = (*project()["dependencies"], *(text for name in used for text in extras[name]))
    asked_for = {canonicalize_name(Requirement(text).name) for text in texts}
    # Triton comes with PyTorch where there is a GPU, and is not used elsewhere.
    allowed = asked_for | {"flux-nf4", "triton"} | set(sys.stdlib_module_names)
    found = {
        f"{named(path)}: {library}"
        for path in (ROOT / "src").rglob("*.py")
        for library in imported_libraries(path)
        if DISTRIBUTIONS.get(library, library) not in allowed
    }

    assert found == set()


def test_the_bootstrap_needs_nothing_but_the_standard_library_and_parses_on_an_old_python():
    for name in ("_environment.py", "_steps.py", "flux-nf4", "test", "check"):
        path = ROOT / "scripts" / name
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
        assert set(imported_libraries(path)) <= set(sys.stdlib_module_names) | {
            "_environment",
            "_steps",
        }
    assert ROOT / "scripts/_environment.py" in committed_files()
