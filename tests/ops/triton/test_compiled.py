"""Triton's kernels as compiled for GPUs, which need not be here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("capability", "dtype"), [("80", "bfloat16"), ("90", "float32")])
def test_every_kernel_compiles_and_moves_16_bytes_at_a_time(tmp_path: Path, capability: str, dtype: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compiled.py")
    command = [sys.executable, str(script), capability, dtype]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert completed.returncode == 0, completed.stderr
    kernels = json.loads(completed.stdout)
    assert {name.split()[0] for name in kernels} == {
        "_rms_norm_kernel",
        "_rms_norm_dx_kernel",
        "_rms_norm_dweight_kernel",
        "_gated_kernel",
        "_gated_backward_kernel",
        "_cross_entropy_kernel",
    }
    for name, ptx in kernels.items():
        assert "ld.global.v4.b32" in ptx, name
        # The weight's gradient ends in sums of one value for each thread.
        assert "st.global.v4.b32" in ptx or name.startswith("_rms_norm_dweight"), name
        assert not re.search(r"\b(ld|st)\.local", ptx), f"{name} keeps values outside of registers"
