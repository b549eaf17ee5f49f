"""`peftcore export`: which files are written, what is said of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peftcore_cli.commands import export
from safetensors.torch import load_file
from support import exported
from support.commands import Run
from support.exported import logits, saved_run

import peftcore


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported.saved_llama(tmp_path_factory.mktemp("base"))


def test_after_an_error_only_what_was_written_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with pytest.raises(MemoryError), export.complete_or_removed(folder, [folder / "model.onnx", folder / "adapter"]):
        (folder / "adapter").mkdir(parents=True)
        for name in ("adapter/adapter_config.json", "model.onnx", "model.onnx.data", "notes.txt", "model.txt"):
            (folder / name).write_text("text")
        raise MemoryError
    assert sorted(each.name for each in folder.iterdir()) == ["model.txt", "notes.txt"]


def test_vllm_and_peft(run: Run, base: Path, tmp_path: Path) -> None:
    ranks = {"r": 20, "rank_pattern": {"v_proj": 24}, "target_modules": ["q_proj", "v_proj"]}
    expected = saved_run(base, tmp_path / "run", **ranks)
    told = run("export", "--format", "vllm", tmp_path / "run").output.replace("\n", " ")
    folder = tmp_path / "run" / "vllm"
    assert f"vllm serve {base} --enable-lora --max-lora-rank 32 --lora-modules mine={folder}" in told
    assert f"sglang.launch_server --model-path {base} --lora-paths mine={folder}" in told
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 24
    from transformers import AutoModelForCausalLM

    run("export", "--format", "peft", folder, "--output", tmp_path / "peft")
    assert (
        load_file(tmp_path / "peft/adapter_model.safetensors").keys()
        == load_file(folder / "adapter_model.safetensors").keys()
    )
    model = peftcore.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft").eval()
    assert torch.allclose(logits(model), expected, atol=2e-5)


def test_asked_for_wrongly(run: Run, base: Path, tmp_path: Path) -> None:
    saved_run(base, tmp_path / "run", r=4)
    given = ("export", tmp_path / "run", "--format")
    wrong = run(*given, "vlm", code=1).output
    assert "the format 'vlm' is unknown (nearest: 'vllm'" in wrong and "onnx, peft" in wrong
    wrong = run(*given, "vllm", "--only", "model", code=1).output
    assert "--only must be adapter for the format 'vllm', found 'model'" in wrong
    assert "NoOptions has no field 'rank'" in run(*given, "peft", "--set", "rank=8", code=1).output
    assert "Pass the folder of one" in run("export", "--format", "vllm", "--model", base, code=1).output
    assert "exists already" in run(*given, "peft", "--output", tmp_path / "run", code=1).output


def test_formats_are_listed(run: Run) -> None:
    """Also those of plugins, with their options."""
    lines = run("export").output.splitlines()
    assert any(line.split()[:3] == ["vllm", "vLLM,", "SGLang"] for line in lines)
    (gguf,) = (line for line in lines if line.startswith("gguf "))
    assert "adapter and model" in gguf and "gguf_type=f16" in gguf and "tokenizer" not in gguf


def test_the_folder_of_a_model_with_dots_in_its_name(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny-v1.0-onnx" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "'tiny-v1.0-onnx' exists" in run("export", "--format", "onnx", "-m", "org/tiny-v1.0", code=1).output
