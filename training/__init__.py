"""The recipe of the demo model: data, tokenizers, training, evaluation. Not part of the wheel.

Every step is one command, `python -m training.<step>`, run from the repository root. What is
small and needed by all of them is committed under `data/`; what a step makes goes to `work/`.
"""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent / "data"
WORK = Path(__file__).parent / "work"
ASSETS = Path(__file__).parents[1] / "src" / "flux_nf4" / "assets"
