import re
from importlib import resources

import pytest
from asgi_client import KEY, ask

UI = resources.files("flux_nf4.server") / "ui"
FILES = sorted(entry.name for entry in UI.iterdir())
SCRIPTS = [name for name in FILES if name.endswith(".js")]


def text_of(name):
    return (UI / name).read_text(encoding="utf-8")


# ---- what is served -----------------------------------------------------------------------------


def test_the_page_is_served_at_the_root():
    answer = ask("GET", "/")

    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text == text_of("index.html")


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_served_as_it_is_with_a_type_of_its_own(name):
    types = {
        "css": "text/css; charset=utf-8",
        "html": "text/html; charset=utf-8",
        "js": "text/javascript; charset=utf-8",
        "svg": "image/svg+xml",
        "webp": "image/webp",
    }
    answer = ask("GET", f"/static/{name}")

    assert answer.content == (UI / name).read_bytes()
    assert answer.headers["content-type"] == types[name.rpartition(".")[2]]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    ["..%2fpage.py", "%2e%2e/page.py", "../page.py", "main.js/", "%00", "Main.js", "", "a/b.js"],
)
def test_no_other_name_leads_anywhere(path):
    assert ask("GET", f"/static/{path}").status_code == 404


def test_a_page_that_a_browser_has_is_not_sent_again():
    etag = ask("GET", "/").headers["etag"]
    answer = ask("GET", "/", headers={"if-none-match": etag})

    assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)


def test_the_page_needs_no_key_and_holds_none():
    answer = ask("GET", "/static/main.js", settings={"api_keys": (KEY,)})

    assert answer.status_code == 200


def test_the_policy_lets_nothing_in_from_elsewhere_and_nothing_inline():
    policy = dict(
        part.split(maxsplit=1)
        for part in ask("GET", "/").headers["content-security-policy"].split("; ")
    )

    assert policy["default-src"] == "'self'"
    assert policy["img-src"] == "'self' blob: data:"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert not any("unsafe" in each or "*" in each or "http" in each for each in policy.values())


# ---- what is in the files -----------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host(name):
    # An XML namespace is a name, not an address.
    found = set(re.findall(rb"(?:https?:)?//[\w.-]+\.\w+", (UI / name).read_bytes()))

    assert found <= {b"http://www.w3.org"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_makes_markup_or_code_of_a_text(name):
    sinks = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser"
    )

    assert re.findall(sinks, text_of(name)) == []


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".js", ".css"))])
def test_a_file_of_the_page_can_be_read_whole(name):
    lines = text_of(name).splitlines()

    assert len(lines) <= 400
    assert max(map(len, lines)) <= 100


def test_the_html_has_no_script_and_no_style_inline():
    html = text_of("index.html")

    assert re.findall(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", html) == []


def test_every_icon_that_is_named_is_drawn():
    drawn = set(re.findall(r'id="(\w+)"', text_of("icons.svg")))
    named = set(re.findall(r'icons\.svg#(\w+)"|data-icon="(\w+)"', text_of("index.html")))
    calls = r'\b(?:icon|setIcon)\((?:\w+, |\$\("[\w-]+"\), )?"(\w+)"\)'
    in_scripts = {icon for name in SCRIPTS for icon in re.findall(calls, text_of(name))}

    assert {icon for pair in named for icon in pair if icon} | in_scripts <= drawn


def test_every_text_is_used():
    keys = re.findall(r"^  (\w+): \[", text_of("strings.js"), re.MULTILINE)
    elsewhere = "".join(text_of(name) for name in [*SCRIPTS, "index.html"] if name != "strings.js")
    made = ("size_", "preset_", "theme_", "memory_")  # from a name in the API or a setting

    assert [key for key in keys if not key.startswith(made) and f'"{key}"' not in elsewhere] == []


def test_every_element_that_a_script_asks_for_exists():
    ids = set(re.findall(r'\bid="([\w-]+)"', text_of("index.html")))
    asked = {each for name in SCRIPTS for each in re.findall(r'\$\("([\w-]+)"\)', text_of(name))}

    assert asked - ids == set()
