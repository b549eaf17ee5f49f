"""No operator is less exact than its peer: benchmarks/exactness.py on a small shape, at every SIMD level."""

import importlib.util
import logging
import sys
import warnings
from pathlib import Path

import pytest
from support.releases import TORCH_2_9

from peftcore import ops

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
LEVELS = ops.extension.cpu_levels() if ops.extension is not None else ["reference"]
GROUPED = pytest.param("grouped", marks=pytest.mark.skipif(TORCH_2_9, reason="PyTorch 2.9 has no grouped_mm"))


@pytest.fixture(scope="module")
def exactness():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "exactness.py"
    spec = importlib.util.spec_from_file_location("exactness", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["exactness"] = module
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():  # it silences what peers say
        spec.loader.exec_module(module)
    logging.disable(disabled)
    return module


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("table", ["lora", GROUPED, "linear_4bit", "nf4", "optim"])
def test_ours_is_at_or_below_the_peer(exactness, table, level):
    before = ops.extension.cpu_level() if ops.extension is not None else None
    if before is not None:
        ops.extension.set_cpu_level(level)
    try:
        small = {"lora": {"ranks": (16, 64, 256)}}.get(table, {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = list(exactness.TABLES[table](exactness.SMALL, **small))
    finally:
        if before is not None:
            ops.extension.set_cpu_level(before)
    assert len(rows) == {"lora": 36, "grouped": 18, "linear_4bit": 18, "nf4": 3, "optim": 2}[table]
    assert not [str(row) for row in rows if not row.holds]
    once = {
        row.what: row.ours.median for row in rows if "bfloat16" in row.what and row.what.startswith("lora_linear y")
    }
    assert all(median < (1.01 if level == "amx" else 1.5) for median in once.values())
