"""`peftcore export --format gguf`: which files are written, and what is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peftcore_cli.bases.adapter_folders import TASK_FILE
from support import commands, exported, tiny
from support.commands import Run
from support.exported import logits, saved_run, tensors

from peftcore.errors import PeftcoreError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported.saved_llama(tmp_path_factory.mktemp("base"))


def test_gguf(run: Run, base: Path, tmp_path: Path) -> None:
    expected = saved_run(base, tmp_path / "run", r=4)
    output = run("export", "--format", "gguf", tmp_path / "run", "--set", "gguf_type=f32").output
    folder = tmp_path / "run" / "gguf"
    assert sorted(file.name for file in folder.iterdir()) == ["adapter.gguf", "model-f32.gguf"]
    assert "llama-cli -m BASE.gguf --lora" in output and "model-f32.gguf" in output
    assert exported.keys(folder / "model-f32.gguf")["tokenizer.chat_template"] == "{{ ours }}"

    run("export", "--format", "gguf", "--model", base, "--set", "gguf_type=f32", "--output", tmp_path / "bare")
    before, after = tensors(tmp_path / "bare/model-f32.gguf"), tensors(folder / "model-f32.gguf")
    pairs = tensors(folder / "adapter.gguf")
    for name in (name.removesuffix(".lora_a") for name in pairs if name.endswith("a")):
        change = pairs[f"{name}.lora_b"] @ pairs[f"{name}.lora_a"]
        scale = exported.keys(folder / "adapter.gguf")["adapter.lora.alpha"] / 4
        assert abs(before[name] + scale * change - after[name]).max() < 2e-6

    # the file is a base in its turn, and its tokenizer goes on to the next one
    second_folder = tmp_path / "again"
    run(
        "export",
        "--format",
        "gguf",
        "--model",
        folder / "model-f32.gguf",
        "--set",
        "gguf_type=f16",
        "--output",
        second_folder,
    )
    facts = exported.keys(second_folder / "model-f16.gguf")
    assert facts["tokenizer.chat_template"] == "{{ ours }}" and facts["tokenizer.ggml.pre"] == "gpt-2"
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(second_folder, gguf_file="model-f16.gguf").eval()
    assert (logits(model) - expected).abs().max() < 5e-3


def test_nothing_is_left_of_an_export_that_fails(run: Run, base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The adapter has been written when the tokenizer of the model turns out not to be writable."""

    def fails(*_: Any) -> None:
        raise PeftcoreError("the tokenizer is of a kind that llama.cpp does not know")

    monkeypatch.setattr("peftcore_gguf.model.write_tokenizer", fails)
    saved_run(base, tmp_path / "run", r=4)
    arguments = ("export", "--format", "gguf", tmp_path / "run", "--output")
    assert "the tokenizer is of a kind" in run(*arguments, tmp_path / "new" / "folder", code=1).output
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    run(*arguments, tmp_path / "empty", code=1)
    assert not [*(tmp_path / "empty").iterdir()]


def test_parts_of_gguf_and_what_is_made_thin(run: Run, base: Path, tmp_path: Path) -> None:
    saved_run(base, tmp_path / "run", "dora", r=4, target_modules=["q_proj"])
    arguments = ("export", "--format", "gguf", tmp_path / "run", "--output")
    error_output = run(*arguments, tmp_path / "x", "--only", "adapter", code=1).output
    assert "cannot be written as an adapter of llama.cpp" in error_output and not (tmp_path / "x").exists()
    output = run(*arguments, tmp_path / "merged").output.replace("\n", " ")
    assert "adapter.gguf was not written. --convert RANK writes" in output
    assert [file.name for file in (tmp_path / "merged").iterdir()] == ["model-f16.gguf"]
    output = run(*arguments, tmp_path / "thin", "--only", "adapter", "--convert", 64).output
    assert "rank 64 preserves at least 100.0% of the norm of the adapter's change" in output
    assert tensors(tmp_path / "thin/adapter.gguf")["blk.0.attn_q.weight.lora_a"].shape == (64, 64)


def test_a_tokenizer_beside_the_adapter_is_the_one_it_was_trained_with(run: Run, base: Path, tmp_path: Path) -> None:
    saved_run(base, tmp_path, r=4)
    (tmp_path / "adapter" / TASK_FILE).unlink()  # as other trainers leave it
    saved_tokenizer = exported.tokenizer(additional_special_tokens=["<|call|>"])
    saved_tokenizer.chat_template = "{{ theirs }}"
    saved_tokenizer.save_pretrained(tmp_path / "adapter")
    run("export", "--format", "gguf", tmp_path, "--only", "model")
    facts = exported.keys(tmp_path / "gguf" / "model-f16.gguf")
    assert facts["tokenizer.chat_template"] == "{{ theirs }}" and "<|call|>" in facts["tokenizer.ggml.tokens"]


def test_asked_for_wrongly(run: Run, base: Path, tmp_path: Path) -> None:
    saved_run(base, tmp_path / "run", r=4)
    arguments = ("export", "--format", "gguf", tmp_path / "run")
    assert (
        "--only must be adapter or model for the format 'gguf', found 'base'"
        in run(*arguments, "--only", "base", code=1).output
    )
    wrong = run(*arguments, "--set", "type=f16", code=1).output
    assert "GgufOptions has no field 'type'" in wrong and "gguf_type" in wrong
    assert "Pass the folder of one" in run("export", "--format", "gguf", code=1).output
    tiny.gpt2().save_pretrained(tmp_path / "gpt2")
    exported.tokenizer().save_pretrained(tmp_path / "gpt2")
    saved_run(tmp_path / "gpt2", tmp_path / "other", r=4)
    output = run("export", "--format", "gguf", tmp_path / "other", code=1).output.replace("\n", " ")
    assert "GPT2LMHeadModel cannot be exported to GGUF" in output and "--convert" not in output
    tiny.llama().save_pretrained(tmp_path / "words")
    commands.save_tokenizer(tmp_path / "words")
    output = run("export", "--format", "gguf", "--model", tmp_path / "words", "--output", tmp_path / "x", code=1).output
    assert "its model is WordLevel" in output.replace("\n", " ") and not list(tmp_path.glob("x/*"))
