"""Models that are not on this machine."""

from __future__ import annotations

from pathlib import Path

from support import fresh_process


def test_a_model_of_the_hub_without_a_network(tmp_path: Path) -> None:
    code = "from peftcore_cli.bases.models import load_config; load_config('nothere', 'causal-lm', ())"
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = fresh_process.run(code, **hub)
    line = done.stderr.splitlines()[-1]
    assert "Retrying" not in done.stderr
    assert (
        "PeftcoreError: 'nothere' is neither a folder nor in the hub's cache, and the hub cannot be reached: " in line
    )
    assert line.endswith("Pass the folder of a model, or connect to the network")
