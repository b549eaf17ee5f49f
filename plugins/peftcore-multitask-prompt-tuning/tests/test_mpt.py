"""Multitask prompt tuning: tasks from the call, starts from a source, and files to and from Hugging Face PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import tiny
from support.against_peft import moved, quiet
from torch import nn

import peftcore
from peftcore.plugin import disturb

NAME = "multitask-prompt-tuning"
TASKS = torch.tensor([2, 1])
KINDS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
FIELDS = {"num_virtual_tokens": 4, "num_ranks": 2}


def peftcore_model(kind: str = "llama", num_tasks: int = 3) -> Any:
    model = peftcore.apply(tiny.MODELS[kind](), NAME, num_tasks=num_tasks, **FIELDS)
    disturb(model, "default", seed=1, std=0.5)
    return model


def peft_model(kind: str, **fields: Any) -> nn.Module:
    config = peft.MultitaskPromptTuningConfig(task_type=KINDS[kind], num_transformer_submodules=1, **FIELDS, **fields)
    return quiet(peft.get_peft_model, tiny.MODELS[kind](), config).eval()


def logits(model: Any, **changes: Any) -> torch.Tensor:
    """PEFT's encoder-decoders take labels, from which the decoder's input comes."""
    call = {"input_ids": tiny.TOKENS, "attention_mask": torch.ones_like(tiny.TOKENS), **changes}
    if model.config.is_encoder_decoder:
        call["labels"] = tiny.TOKENS[:, :4].clone()
    with torch.no_grad():
        actual = quiet(model, **call).logits
    return actual[:, -4:] if actual.dim() == 3 else actual


@pytest.mark.parametrize("kind", list(KINDS))
def test_files(kind: str, tmp_path: Path) -> None:
    model = peftcore_model(kind)
    actual = logits(model, task_ids=TASKS)
    assert (actual - logits(model, task_ids=TASKS.flip(0))).abs().max() > 1e-3
    peftcore.save(model, tmp_path / "peftcore")
    read = quiet(peft.PeftModel.from_pretrained, tiny.MODELS[kind](), tmp_path / "peftcore").eval()
    torch.testing.assert_close(logits(read, task_ids=TASKS), actual, rtol=0, atol=1e-5)
    other = moved(peft_model(kind, num_tasks=3))
    quiet(other.save_pretrained, tmp_path / "peft")
    model = peftcore.load(tiny.MODELS[kind](), tmp_path / "peft")
    torch.testing.assert_close(logits(model, task_ids=TASKS), logits(other, task_ids=TASKS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["ONLY_SOURCE_SHARED", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK"])
def test_starts_from_a_source_are_peft_s(init: str, tmp_path: Path) -> None:
    peftcore.save(peftcore_model(), tmp_path)
    file = str(tmp_path / "adapter_model.safetensors")
    fields = {"prompt_tuning_init": init, "prompt_tuning_init_state_dict_path": file, "prompt_tuning_init_task": 2}
    actual = peftcore.apply(tiny.llama(), NAME, **FIELDS, **fields)
    expected = peft_model("llama", **fields).prompt_encoder["default"]
    prompt = next(module for module in actual.modules() if hasattr(module, "prefix_task_cols"))
    assert torch.equal(prompt.prompt_embeddings, expected.embedding.weight)
    if init != "ONLY_SOURCE_SHARED":
        assert torch.equal(prompt.prefix_task_cols, expected.prefix_task_cols)
        assert torch.equal(prompt.prefix_task_rows, expected.prefix_task_rows)
    peftcore.save(actual, tmp_path / "again")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.testing.assert_close(logits(peftcore.load(tiny.llama(), tmp_path / "again")), logits(actual), rtol=0, atol=0)
    with pytest.raises(peftcore.PeftcoreError, match="is not a safetensors file"):
        peftcore.apply(tiny.llama(), NAME, **FIELDS, **fields)


def test_starts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    peftcore.save(peftcore_model(), tmp_path)
    exact: dict[str, Any] = {"prompt_tuning_init": "EXACT_SOURCE_TASK"}
    with pytest.raises(peftcore.PeftcoreError, match="needs prompt_tuning_init_state_dict_path"):
        peftcore.apply(tiny.llama(), NAME, **exact)
    exact["prompt_tuning_init_state_dict_path"] = str(tmp_path)
    with pytest.raises(peftcore.PeftcoreError, match="num_tasks must be 1, found 2"):
        peftcore.apply(tiny.llama(), NAME, num_tasks=2, **exact)
    with pytest.raises(
        peftcore.PeftcoreError, match=r"'prompt_embeddings' of .* has shape \[4, 32\], but the prompt needs \[5, 32\]"
    ):
        peftcore.apply(tiny.llama(), NAME, num_virtual_tokens=5, **exact)
    with pytest.raises(peftcore.PeftcoreError, match=r"'prefix_task_cols' of .* has shape \[0, 4, 2\]"):
        peftcore.apply(tiny.llama(), NAME, prompt_tuning_init_task=3, **FIELDS, **exact)


def test_rows_of_a_decoder_are_refused() -> None:
    with pytest.raises(
        peftcore.PeftcoreError, match=r"before the encoder's input only. Use num_transformer_submodules=1"
    ):
        peftcore.apply(tiny.t5(), NAME, num_transformer_submodules=2)


def test_tasks_come_from_the_call() -> None:
    model = peftcore_model()
    with pytest.raises(peftcore.PeftcoreError, match="the prompt has 3 tasks, but the call names none"):
        logits(model)
    with pytest.raises(peftcore.PeftcoreError, match=r"in a batch of 2"):
        logits(model, task_ids=torch.arange(3))
    with peftcore.call_arguments(model, task_ids=1):
        torch.testing.assert_close(logits(model), logits(model, task_ids=torch.ones(2).long()))
        generated = model.generate(tiny.TOKENS, num_beams=2, max_new_tokens=3, do_sample=False)
    ones = torch.ones(2).long()
    assert torch.equal(generated, model.generate(tiny.TOKENS, task_ids=ones, num_beams=2, max_new_tokens=3))
    one = peftcore_model(num_tasks=1)
    torch.testing.assert_close(logits(one), logits(one, task_ids=torch.zeros(2).long()))
    with peftcore.disabled(model):
        assert torch.equal(logits(model, task_ids=TASKS), logits(tiny.llama()))


@pytest.mark.parametrize(
    ("tasks", "found"),
    [
        (torch.tensor([0, 3]), r"\[0, 3\]"),
        (torch.tensor([-1, 0]), r"\[-1, 0\]"),
        ([2, 7], r"\[2, 7\]"),
        (3, r"\[3\]"),
        (torch.tensor([0.0, 1.0]), r"float32 \[2\]"),
        (torch.tensor([True, False]), r"bool \[2\]"),
        (torch.tensor([], dtype=torch.int64), r"int64 \[0\]"),
    ],
)
def test_tasks_that_there_are_not(tasks: Any, found: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=f"task_ids must be whole numbers from 0 to 2, found {found}"):
        logits(peftcore_model(), task_ids=tasks)


def test_a_task_for_each_row_in_other_dtypes_and_shapes() -> None:
    model = peftcore_model()
    expected = logits(model, task_ids=TASKS)
    for given in (TASKS.int(), TASKS.to(torch.uint8), TASKS[:, None], TASKS.tolist()):
        assert torch.equal(logits(model, task_ids=given), expected)
