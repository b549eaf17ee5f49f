"""Adapters of a vocabulary of their own: PEFT's, of a model with more rows, and a tokenizer beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import exported
from support.commands import Run, write_jsonl

import peftcore

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
TEMPLATE = "{% for m in messages %}{{ m['content'] + '<|new|>' }}{% endfor %}"
NEW = 10  # rows more than the base's


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported.saved_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def theirs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(the folder that PEFT wrote, its model): a new token ends answers, and the embedding has more rows for it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("theirs") / "tuned"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>", "<|more|>", "<|most|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|new|>", TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(exported.VOCABULARY + NEW)
    torch.manual_seed(3)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.nn.init.normal_(part.weight[-NEW:], std=0.1)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    model.save_pretrained(folder, save_embedding_layers=True)
    tokenizer.save_pretrained(folder)
    return folder, model.eval()


def test_every_command_has_its_rows_and_its_tokens(run: Run, base: Path, theirs: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, model = theirs
    wanted = exported.logits(model)
    run("merge", folder, "-o", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(exported.logits(merged), wanted, atol=1e-5, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|new|>") >= exported.VOCABULARY - 2
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token_id in merged.generation_config.eos_token_id

    run("export", folder, "--format", "gguf", "--only", "model", "--set", "gguf_type=f32", "-o", tmp_path / "gguf")
    file = tmp_path / "gguf" / "model-f32.gguf"
    assert exported.keys(file)["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert exported.tensors(file)["token_embd.weight"].shape[0] == exported.VOCABULARY + NEW

    rows = [{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]}] * 4
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    evaluated = run("eval", folder, "-d", data)
    assert "the base has random embeddings for the new tokens" in evaluated.stderr
    run("train", "-a", folder, "-d", data, "--eval-data", data, "-o", tmp_path / "run", "--steps", 1, "--lr", "1e-9")
    found = json.loads((tmp_path / "run" / "result.json").read_text())["before"]["loss"]
    assert f"{found:.4f}" in evaluated.output and found == pytest.approx(
        loss_of(model, tokenizer, "ab<|new|>", "ba<|new|>")
    )
    again = peftcore.load(resized(base), tmp_path / "run" / "adapter", trainable=False)
    torch.testing.assert_close(exported.logits(again), wanted, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").eos_token == "<|new|>"
    told = run("generate", folder, "-p", "ab", "--compare", "--max-new-tokens", 2)
    assert "the base has random embeddings for the new tokens" in told.stderr


def resized(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(exported.VOCABULARY + NEW)
    return model


@torch.no_grad()
def loss_of(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    before, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]
    logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -float(sum(logs[i - 1, ids[i]] for i in range(len(before), len(ids)))) / (len(ids) - len(before))


def test_chat_with_one_of_them(run: Run, theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = theirs
    said = iter(["ab", "/use base", "/adapters", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(said))
    result = run("chat", folder, "--max-new-tokens", 3)
    assert "the base has no embeddings for the new tokens" in result.stderr and "tuned\n" in result.stdout
    assert "tuned, base" not in result.stdout


def test_chat_takes_the_tokenizer_of_who_answers(
    run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftcore_cli.tasks import text_generation
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = {}
    for name in ("one", "two"):
        model = peftcore.apply(AutoModelForCausalLM.from_pretrained(base), "lora", r=2)
        folders[name] = peftcore.save(model, tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = f"{name}: {{{{ messages[-1]['content'] }}}}"
        tokenizer.save_pretrained(tmp_path / name)
    heard: list[str] = []

    def answer(model: Any, tokenizer: Any, messages: Any, **_: Any) -> str:
        heard.append(tokenizer.apply_chat_template(messages, tokenize=False))
        return ""

    monkeypatch.setattr(text_generation, "generate_text", answer)
    said = iter(["a", "/use one", "b", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(said))
    run("chat", *(f"{name}={folder}" for name, folder in folders.items()))
    assert heard == ["two: a", "one: b"]


def test_vocabularies_that_do_not_go_together(run: Run, base: Path, theirs: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, _ = theirs
    model = peftcore.apply(AutoModelForCausalLM.from_pretrained(base), "lora", r=2)
    peftcore.save(model, tmp_path / "plain")
    error = run("chat", folder, tmp_path / "plain", code=1).output
    assert "'tuned' 272, 'plain' 262 tokens. Load one at a time" in error
    for file in folder.glob("*token*"):
        shutil.copy(file, tmp_path / "plain")
    error = run("merge", tmp_path / "plain", "-o", tmp_path / "merged", code=1).output
    assert "has 263 tokens, but the base has embeddings for 262 and the adapter stores none" in error
    assert "save_embedding_layers=True" in error and not (tmp_path / "merged").exists()
