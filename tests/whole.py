"""Which of two runs this is: `make test`, the day's, or `make test-all`, which has all families, cases and checks."""

from __future__ import annotations

import os

WHOLE = os.environ.get("PEFTCORE_TESTS") == "all"
