"""TRL's SFTTrainer, unchanged: the adapter in its checkpoints, an exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from commands import WORDS, save_tokenizer

import peftcore

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),  # TRL sets it by its older name
    pytest.mark.slow,
]


def test_sft_trainer(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    save_tokenizer(tmp_path / "tokenizer")
    rows = Dataset.from_list([{"text": f"the film is {word} and the story {word}"} for word in WORDS])

    def trainer(model: torch.nn.Module) -> SFTTrainer:
        arguments = SFTConfig(
            str(tmp_path / "run"),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            max_length=16,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
        return SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return peftcore.apply(tiny.llama(), "lora", r=2)

    whole, resumed = model(), model()
    trainer(whole).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "complete.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    trainer(resumed).train(resume_from_checkpoint=str(checkpoint))
    pairs = list(zip(whole.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert "trl" in (tmp_path / "run" / "README.md").read_text()
