"""The page, the server and the demo model together, started as a user starts them."""

import re
import signal
import subprocess
import sys

import pytest
from pages import PROMPT, draw
from playwright.sync_api import expect


def said(process, pattern):
    """Wait until the server says something, however long it takes to come to that."""
    text = ""
    while (found := re.search(pattern, text)) is None:
        line = process.stderr.readline()
        assert line, f"the server ended: {text}"
        text += line
    return found


@pytest.fixture
def server():
    command = [sys.executable, "-m", "flux_nf4", "serve", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


@pytest.mark.slow
def test_a_visitor_who_comes_while_the_model_is_loading_draws_an_apple(visitor, server):
    visitor.expected = "status of 503"
    page = visitor.open(said(server, r"page +(http://\S+)")[1], waits_for="#prompt")
    page.locator("#num_inference_steps").fill("6")
    # A busy machine may load for longer than anybody waits for a page.
    said(server, "ready after")
    expect(page.locator("#model")).to_be_visible()
    draw(page)

    expect(page.get_by_role("img", name=PROMPT, exact=True)).to_be_visible()
    expect(page.locator("#result-facts")).to_contain_text("256 x 256, 6 steps")
