import ast
import re
import subprocess
import sys
import tokenize
from fnmatch import filter as filter_names
from fnmatch import fnmatch

import pytest
from repository import ROOT, committed_files, named, package_modules, parsed

from flux_nf4 import errors

PAGES = sorted(path for path in committed_files() if path.suffix == ".md")
READMES = (ROOT / "README.md", ROOT / "README.zh.md")


def text_of(path):
    return path.read_text(encoding="utf-8")


def code_blocks(text):
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def headings(text):
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [len(marks) for marks in re.findall(r"^(#+) ", outside, re.MULTILINE)]


# ---- docstrings ---------------------------------------------------------------------------------


def without_docstring(body, prefix=""):
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        overload = any(getattr(each, "id", "") == "overload" for each in node.decorator_list)
        if ast.get_docstring(node) is None and not overload:
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from without_docstring(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", package_modules(), ids=named)
def test_everything_public_has_a_docstring(path):
    tree = parsed(path)
    missing = [] if ast.get_docstring(tree) else [named(path)]

    assert missing + list(without_docstring(tree.body)) == []


# ---- errors -------------------------------------------------------------------------------------


def documented_tree():
    """The tree in the docstring of errors.py: class -> the class above it."""
    above, parents = [], {}
    for line in errors.__doc__.splitlines():
        found = re.match(r"    ((?:[|`]-- |[|] {3}| {4})*)(\w+)(?: |$)", line)
        if found is None:
            continue
        depth, name = len(found[1]) // 4, found[2]
        above[depth:] = [name]
        parents[name] = above[depth - 1] if depth else None
    return parents


def test_the_tree_of_errors_is_drawn_as_it_is():
    classes = [each for each in vars(errors).values() if isinstance(each, type)]
    ours = [each for each in classes if issubclass(each, errors.FluxNF4Error)]
    parents = {each.__name__: each.__base__.__name__ for each in ours}
    parents["FluxNF4Error"] = None

    assert documented_tree() == parents


# ---- pages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_every_link_inside_the_repository_leads_somewhere(path):
    prose = re.sub(r"^```.*?^```", "", text_of(path), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose)
    local = [each for each in targets if "://" not in each and not each.startswith("mailto:")]

    assert [each for each in local if not (path.parent / each).exists()] == []


def test_both_readmes_show_the_same_code():
    english, chinese = (code_blocks(text_of(path)) for path in READMES)

    assert english == chinese


def test_both_readmes_have_the_same_headings():
    english, chinese = (headings(text_of(path)) for path in READMES)

    assert english == chinese


def test_both_readmes_show_the_same_pictures_and_links():
    english, chinese = (
        [target for target in re.findall(r"\]\(([^)]+)\)", text_of(path)) if "README" not in target]
        for path in READMES
    )

    assert english == chinese


def modules_on_the_map():
    """The names of files in ARCHITECTURE.md; `sdapi*.py` stands for several."""
    return set(re.findall(r"`(?:[\w/]+/)?([\w*]+\.py)`", text_of(ROOT / "ARCHITECTURE.md")))


def test_every_module_is_on_the_map():
    names = {path.name for path in package_modules()} - {"__init__.py", "__main__.py"}
    shown = modules_on_the_map()

    assert [name for name in sorted(names) if not any(fnmatch(name, each) for each in shown)] == []


def test_every_module_on_the_map_exists():
    names = [path.name for path in package_modules()]

    assert [each for each in sorted(modules_on_the_map()) if not filter_names(names, each)] == []


def shell_lines(path):
    blocks = [code for language, code in code_blocks(text_of(path)) if language == "sh"]
    return [line for code in blocks for line in code.replace("\\\n", " ").splitlines() if line]


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_every_script_that_is_named_exists_and_runs(path):
    scripts = [line.split()[0] for line in shell_lines(path) if line.startswith("scripts/")]

    assert [each for each in scripts if not (ROOT / each).stat().st_mode & 0o100] == []


def commands():
    """The lines of both READMEs that run flux-nf4, as (verb, options)."""
    for path in READMES:
        for line in shell_lines(path):
            found = re.match(r"(?:scripts/)?flux-nf4 (\w+)(.*)", line.split(" #")[0])
            if found is not None:
                yield found[1], tuple(re.findall(r"(?<= )--?[a-z][a-z-]*", found[2]))


@pytest.mark.parametrize(("verb", "options"), sorted(set(commands())))
def test_every_command_in_the_readme_is_one_that_flux_nf4_knows(verb, options):
    done = subprocess.run(
        [sys.executable, "-m", "flux_nf4", verb, "--help"], capture_output=True, text=True
    )

    assert done.returncode == 0
    assert [each for each in options if each not in done.stdout] == []


# ---- what must not be in the repository ---------------------------------------------------------

# A path of somebody's own machine: whoever reads it has no such folder.
OWN_PATHS = re.compile(r"(?<![\w.])/(?:root|Users|opt/wheels|work/(?:main|shared|dev))/")


def is_text(path):
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def test_no_file_names_a_path_of_one_machine():
    found = [
        f"{named(path)}: {match[0]}"
        for path in committed_files()
        if is_text(path) and (match := OWN_PATHS.search(text_of(path)))
    ]

    assert found == []


def test_no_comment_puts_work_off():
    words = {"TO" + "DO", "FIX" + "ME", "X" * 3}
    found = []
    for path in committed_files():
        if path.suffix != ".py":
            continue
        with tokenize.open(path) as file:
            comments = [
                t for t in tokenize.generate_tokens(file.readline) if t.type == tokenize.COMMENT
            ]
        found += [f"{named(path)}:{t.start[0]}" for t in comments if words & set(t.string.split())]

    assert found == []


def test_no_file_is_heavier_than_what_ships_but_the_weights_before_nf4():
    limit_bytes = 20_000_000
    heavy = [named(path) for path in committed_files() if path.stat().st_size > limit_bytes]

    assert heavy == ["training/weights/flux-demo-bf16.safetensors"]
