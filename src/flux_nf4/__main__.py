"""`python -m flux_nf4` is `flux-nf4`."""

from __future__ import annotations

import sys

from flux_nf4.cli import main

if __name__ == "__main__":
    sys.exit(main())
