import importlib.metadata
import re

import pytest
from repository import PACKAGE, ROOT, project

import flux_nf4


@pytest.mark.parametrize("name", flux_nf4.__all__)
def test_every_exported_name_exists(name):
    assert getattr(flux_nf4, name) is not None


def test_exported_names_are_sorted():
    assert flux_nf4.__all__ == sorted(flux_nf4.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        flux_nf4.no_such_name  # noqa: B018


def test_the_version_is_the_one_of_pyproject():
    assert flux_nf4.__version__ == project()["version"]


def test_the_installed_package_is_this_version():
    assert importlib.metadata.version("flux-nf4") == flux_nf4.__version__


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_the_changelog_has_a_heading_for_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

    assert re.search(rf"^## \[{re.escape(flux_nf4.__version__)}\]", text, re.MULTILINE)
