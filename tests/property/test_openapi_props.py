"""What the API's description allows, and much that it forbids, sent to a live server."""

import subprocess
import sys
from pathlib import Path

import pytest
from live_server import live_server
from server_fakes import FakeEngine

SCHEMATHESIS = Path(sys.executable).with_name("st")
OPTIONS = ["--checks", "all", "--phases", "coverage,fuzzing", "--max-examples", "5", "--no-color"]
OPTIONS += ["--generation-deterministic"]
# Of base64 and of files a description cannot tell which are images, so what fits it may be refused.
LEFT_OUT = "positive_data_acceptance"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("routes", "left_out"),
    [
        # A1111's clients send 0 and 1 for switches: what it takes, we take.
        ("^/sdapi/", f"{LEFT_OUT},negative_data_rejection"),
        ("^/(?!sdapi/)", LEFT_OUT),
    ],
    ids=["a1111", "all others"],
)
def test_no_request_finds_a_fault_or_an_answer_that_is_not_described(tmp_path, routes, left_out):
    limits = {"max_pixels": 256 * 256, "max_megapixel_steps": 3.0}
    with live_server(FakeEngine(max_queue=1000), **limits) as server:
        command = [SCHEMATHESIS, "run", f"{server.url}/openapi.json", *OPTIONS]
        command += ["--include-path-regex", routes, "--exclude-checks", left_out]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout
    assert "Tested:" in done.stdout
