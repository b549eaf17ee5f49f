"""`make test` is the whole suite of the day, `make test-all` adds what is marked `nightly` and all cases of corpora.

Nothing is drawn: a test runs in every run of its name, or in none. The longest files come first, since workers take
whole files, and one of them would end alone with it.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import hypothesis
import pytest
from support.whole_run import WHOLE

# The same examples in every run, however slow the machine is.
hypothesis.settings.register_profile(
    "deterministic", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("deterministic")

ROOT = Path(__file__).parent
FROZEN = pytest.StashKey[tuple[Path, int]]()
CONFORMANCE = "conformance.py"  # a file for each method, of 2 to 12 seconds
# Half a minute and more each, on a slow machine.
LONGEST = (
    "tests/card/test_card.py",
    "tests/csrc/test_sanitizers.py",
    "tests/emulator/test_lora_kernels.py",
    "tests/distributed/test_sharding.py",
    "plugins/peftcore-cli/tests/training/test_parallel.py",
    "plugins/peftcore-cli/tests/commands/test_train.py",
    "tests/emulator/test_linear_4bit_kernel.py",
    "tests/test_census.py",
    "plugins/peftcore-cli/tests/commands/test_new_plugin.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not WHOLE:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("nightly")])
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    """Return 0 for the longest files, 1 for conformance, and 2 for the rest, so that short tests come last.

    A worker is given its next file while two tests of the one before are left: a few long tests in files of their own
    would keep one worker busy at the end, and leave the other without work.
    """
    if item.path.relative_to(ROOT).as_posix() in LONGEST:
        return 0
    return 1 if item.path.name.endswith(CONFORMANCE) else 2


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave what is alive out of later garbage collections: for each file, and where many modules were imported.

    A collection that walks PyTorch and transformers takes 0.3 s, and accelerate asks for one in every training.
    """
    path, modules = item.config.stash.get(FROZEN, (None, 0))
    if path != item.path or len(sys.modules) > modules + 50:
        gc.collect()
        gc.freeze()
        item.config.stash[FROZEN] = item.path, len(sys.modules)
