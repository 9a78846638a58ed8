"""A real browser on the real page. Whatever it complains of on its console fails the test."""

from __future__ import annotations

import contextlib
import os
import re
import shutil

import pytest
from live_server import live_server
from playwright.sync_api import expect, sync_playwright

# Debian, Fedora, and what Google ships; TEST_BROWSER names any other.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_BROWSER = "no Chromium here: `apt-get install chromium`, or set TEST_BROWSER to the path of one"
# Longer than anything takes on a busy machine; nothing waits for it where all is well.
PATIENCE_MS = 30_000
expect.set_options(timeout=PATIENCE_MS)


def browser_path():
    named = os.environ.get("TEST_BROWSER")
    found = [named] if named else [path for name in BROWSERS if (path := shutil.which(name))]
    return found[0] if found else None


# Not for the session: while Playwright runs, its event loop keeps other tests from running theirs.
@pytest.fixture(scope="module")
def browser():
    path = browser_path()
    if path is None:
        # A laptop need not have one. CI names its own, and fails if that does not start.
        pytest.skip(NO_BROWSER)
    with sync_playwright() as playwright:
        # A container has no user namespaces for the sandbox; the pages are our own.
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def start_server():
    """`live_server`, for as long as the test and its pages last."""
    with contextlib.ExitStack() as stack:

        def start(*engine, **settings):
            server = stack.enter_context(live_server(*engine, **settings))
            # An engine that a test holds must not wait for it any more.
            stack.callback(server.pull, server.engine.release)
            return server

        yield start


@pytest.fixture
def server(start_server):
    return start_server()


class Visitor:
    """Opens pages and keeps what their consoles say."""

    def __init__(self, browser):
        self.browser = browser
        self.contexts = []
        self.complaints = []
        self.expected = None  # a pattern of complaints that the test brings about

    def open(
        self,
        url,
        *,
        width=1280,
        height=800,
        waits_for="#model",
        locale="en-US",
        routes=(),
        script="",
        **options,
    ):
        context = self.browser.new_context(
            viewport={"width": width, "height": height}, locale=locale, **options
        )
        self.contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.add_init_script(script)
        for pattern, answer in dict(routes).items():
            page.route(pattern, answer)
        page.on("console", lambda said: said.type in ("error", "warning") and self.note(said.text))
        page.on("pageerror", lambda error: self.note(str(error)))
        page.goto(url)
        expect(page.locator(waits_for)).to_be_visible()
        return page

    def note(self, text):
        if self.expected is None or not re.search(self.expected, text):
            self.complaints.append(text)


@pytest.fixture
def visitor(browser, start_server):  # asked for, so that pages are closed before their server
    """Fails the test for every error on a console: a policy violated, a request refused, a bug."""
    visitor = Visitor(browser)
    yield visitor
    for context in visitor.contexts:
        context.close()
    assert visitor.complaints == []


@pytest.fixture
def page(visitor, server):
    return visitor.open(server.url)
