import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "diffusers", "triton", "tokenizers", "bitsandbytes")

REPORT = "import json, sys; sys.stderr.write(json.dumps([m for m in sys.modules if '.' not in m]))"


def modules_after(code):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {REPORT}"], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import flux_nf4",
        "import flux_nf4.cli",
        "import flux_nf4.errors",
        "from flux_nf4.cli import main; main(['--help'])",
        "from flux_nf4.cli import main; main(['--version'])",
        "from flux_nf4.cli import main; main(['generate', '--help'])",
        "from flux_nf4.cli import main; main(['generate', '--no-such-option'])",
    ],
)
def test_no_heavy_library_is_imported_by(code):
    assert modules_after(code).isdisjoint(HEAVY)


def test_the_codec_needs_nothing_but_torch():
    loaded = modules_after("import flux_nf4.nf4.codec, flux_nf4.nf4.reference")

    assert loaded.isdisjoint(set(HEAVY) - {"torch"})
