"""TRL's SFTTrainer, unchanged: the adapter in its checkpoints, an exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.commands import WORDS, save_tokenizer
from support.mixtures import INPUTS, mixture

import peftcore
from peftcore.engine import adapter_parameters

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),  # TRL sets it by its older name
]


def sft_trainer(model: torch.nn.Module, folder: Path, **changes: Any) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    save_tokenizer(folder / "tokenizer")
    rows = Dataset.from_list([{"text": f"the film is {word} and the story {word}"} for word in WORDS])
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.05}
    settings |= {"max_length": 16, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    arguments = SFTConfig(str(folder / "run"), dataloader_pin_memory=False, **{**settings, **changes})
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)


def test_sft_trainer(tmp_path: Path) -> None:
    def trainer(model: torch.nn.Module) -> Any:
        return sft_trainer(model, tmp_path)

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


@pytest.mark.parametrize("quantized", [False, True])
def test_experts(quantized: bool, tmp_path: Path) -> None:
    """With checkpointing, which TRL sets; what is saved is what was trained, and loads into a base of its own."""

    def base() -> torch.nn.Module:
        model = mixture("qwen3_moe")
        return peftcore.quantize(model) if quantized else model

    model = peftcore.apply(base(), "lora", r=4)
    before = {name: p.detach().clone() for name, p in adapter_parameters(model, "default") if "experts" in name}
    sft_trainer(model, tmp_path).train()
    parameters = dict(adapter_parameters(model, "default"))
    assert len(before) == 8 and all(not torch.equal(p, parameters[name]) for name, p in before.items())
    loaded = peftcore.load(base(), tmp_path / "run" / "checkpoint-4").eval()
    assert torch.equal(loaded(**INPUTS).logits, model.eval()(**INPUTS).logits)


def test_a_term_of_the_loss_and_groups_of_parameters(tmp_path: Path) -> None:
    def only(adapters: Any, config: Any) -> torch.Tensor:
        return torch.stack([adapter.gain for adapter in adapters.values()]).sum()

    def still(adapters: Any, config: Any, lr: float, decay: float) -> list[dict[str, Any]]:
        first, *_ = adapters.values()
        return [{"params": [first.gain], "lr": 0.0}]

    with tiny.installed(tiny.method("pulled", loss=only, parameter_groups=still)):
        model = peftcore.apply(tiny.llama(), "pulled", value=1.0)
        torch.nn.init.zeros_(model.lm_head.weight)  # the loss has no gradient
        settings = {"optim": "sgd", "gradient_accumulation_steps": 3, "lr_scheduler_type": "constant"}
        trained = sft_trainer(model, tmp_path, **settings, logging_steps=1, max_grad_norm=0.0, save_strategy="no")
        trained.train()
    history = [entry for entry in trained.state.log_history if "loss" in entry]
    assert [entry["extra_loss/default"] for entry in history] == pytest.approx([2.0, 1.95, 1.9, 1.85])
    assert [p.item() for p in model.parameters() if p.requires_grad] == [1.0, pytest.approx(0.8)]
