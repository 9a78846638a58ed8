import ast

import pytest
from repository import named, package_modules, parsed

# A module that wants more wants a second module. Raising one of these is a decision of its own.
MODULE_LINES = 400
FUNCTION_LINES = 60
PACKAGE_LINES = 30_600  # 14,000 until `quantize`, the planner, the server and its page came


def num_lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("path", package_modules(), ids=named)
def test_module_can_be_read_whole(path):
    assert num_lines(path) <= MODULE_LINES


def code_lines(function):
    """The lines of a function without its docstring: prose may take the room that it needs."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    prose = first.end_lineno - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - prose


@pytest.mark.parametrize("path", package_modules(), ids=named)
def test_no_function_is_longer_than_a_screen(path):
    lengths = {
        node.name: code_lines(node)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }

    assert {name: length for name, length in lengths.items() if length > FUNCTION_LINES} == {}


def test_the_package_keeps_its_budget():
    assert sum(num_lines(path) for path in package_modules()) <= PACKAGE_LINES
