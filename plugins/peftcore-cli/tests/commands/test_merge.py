"""What `peftcore merge` writes next to the weights, and what it refuses before it loads them."""

from __future__ import annotations

from pathlib import Path

from peftcore_cli.bases.adapter_folders import AdapterTask
from support.commands import Run
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftcore


def test_the_chat_template_of_the_training(run: Run, llama: Path, tmp_path: Path) -> None:
    model = peftcore.apply(AutoModelForCausalLM.from_pretrained(llama), "lora", r=2)
    adapter = peftcore.save(model, tmp_path / "adapter")
    AdapterTask("causal-lm", 512, chat=True, chat_template="chatml").write(adapter)
    words = ("merge", adapter, "-m", llama, "-o", tmp_path / "merged")
    assert (
        "--shard-size must be a number with a unit (KB, MB, GB, TB)" in run(*words, "--shard-size", "5", code=1).output
    )
    run(*words)
    talk = [{"role": "user", "content": "a"}]
    assert "<|im_start|>user\na" in AutoTokenizer.from_pretrained(tmp_path / "merged").apply_chat_template(
        talk, tokenize=False
    )
