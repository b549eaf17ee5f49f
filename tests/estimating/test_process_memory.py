"""Peak of a real process compared with the range that is predicted for it.

The range is meant to hold 19 of 20 peaks, which `benchmarks/estimate.py` measures. A single case may miss it on a
processor that nobody has tried, so a test allows a quarter more.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.whole_run import nightly_but
from transformers import LlamaConfig

import peftcore

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the peak comes from /proc/self/status"),
]
SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL, LARGER = (
    {**SIZES, "num_hidden_layers": layers, "vocab_size": words} for layers, words in ((3, 4000), (8, 9000))
)
CASES: dict[str, tuple[dict[str, Any], str | None, dict[str, Any]]] = {
    "lora": (SMALL, "lora", {"batch_size": 4, "length": 128}),
    "every parameter": (LARGER, None, {"batch_size": 4, "length": 128, "optimizer": "sgd"}),
    "checkpointing": (LARGER, "dora", {"batch_size": 8, "length": 128, "gradient_checkpointing": True}),
    "8-bit optimizer": (LARGER, None, {"batch_size": 2, "length": 256, "optimizer": "adamw_8bit"}),
    "long": (LARGER, "ia3", {"batch_size": 1, "length": 1024}),
}


@pytest.mark.parametrize("case", nightly_but(CASES, ("lora",)))
def test_the_peak_is_near_the_range(case: str) -> None:
    sizes, method, run = CASES[case]
    found = peftcore.estimate(LlamaConfig(**sizes), method, **run)
    code = f"from support import step_memory; print(step_memory.peak_beyond_libraries({sizes!r}, {method!r}, {run!r}))"
    folder = Path(__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    low, high = found.beyond_libraries
    assert low / 1.25 <= int(ran.stdout.splitlines()[-1]) <= 1.25 * high
