"""The page, the server and the demo model together, started as a user starts them."""

import re
import signal
import subprocess
import sys

import pytest
from pages import PROMPT, draw
from playwright.sync_api import expect


@pytest.fixture
def address():
    command = [sys.executable, "-m", "flux_nf4", "serve", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        said = ""
        while (found := re.search(r"page +(http://\S+)", said)) is None:
            line = process.stderr.readline()
            assert line, f"the server ended: {said}"
            said += line
        yield found[1]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


@pytest.mark.slow
def test_a_visitor_draws_an_apple_while_the_model_is_still_loading(visitor, address):
    visitor.expected = "status of 503"
    page = visitor.open(address)
    page.locator("#num_inference_steps").fill("6")
    draw(page)

    expect(page.get_by_role("img", name=PROMPT, exact=True)).to_be_visible()
    expect(page.locator("#result-facts")).to_contain_text("256 x 256, 6 steps")
