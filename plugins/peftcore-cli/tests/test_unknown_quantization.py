"""A base whose `quantization_config` transformers would skip, so that its weights would be random."""

import json
from pathlib import Path
from typing import Any

import pytest
from peftcore_cli.bases.models import load_model
from support import tiny

import peftcore


@pytest.mark.parametrize("stored", [{"quant_method": "GPTQ", "bits": 4}, {"quant_method": ["gptq"]}, {"bits": 4}])
def test_it_is_refused(stored: dict[str, Any], tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    with pytest.raises(peftcore.PeftcoreError, match=r"has quant_method=.*which transformers does not know"):
        load_model(str(tmp_path), "causal-lm")
