"""`inspect`: an adapter on disk, without its base."""

import json
from pathlib import Path

import pytest
import torch
from support import tiny

import peftcore


def saved(folder: Path) -> Path:
    return peftcore.save(peftcore.apply(tiny.llama(), "lora", r=4, target_modules=["q_proj"]), folder)


def test_what_the_files_say(tmp_path: Path) -> None:
    info = peftcore.inspect(saved(tmp_path))
    model = peftcore.load(tiny.llama(), tmp_path)
    (adapter,) = peftcore.summary(model).adapters
    assert (info.path, info.format, info.peft_type, info.method) == (tmp_path, "peft", "LORA", "lora")
    assert (info.problem, info.base_is_checked) == (None, True)
    assert info.writer == f"peftcore {peftcore.__version__}"
    assert (info.parameters, info.bytes) == (adapter.parameters, adapter.bytes)
    assert info.fields["r"] == 4
    assert all(tensor.is_meta and tensor.dtype == torch.float32 for tensor in info.tensors)
    assert "parameters               " in str(info)


def test_a_field_that_the_method_does_not_know_is_the_problem(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    peft = peftcore.state_dict(peftcore.load(tiny.llama(), tmp_path), "default")
    from safetensors.torch import save_file

    save_file(peft, tmp_path / "adapter_model.safetensors")  # as PEFT writes it, without metadata of peftcore
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_magic": True, "peft_version": "0.99"}))
    info = peftcore.inspect(tmp_path)
    assert info.method == "lora" and "use_magic" in str(info.problem)
    assert (info.writer, info.base_is_checked) == ("PEFT 0.99", False)


def test_without_a_method_that_reads_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "UNHEARD_OF", "r": 2}))
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3, 2)}, tmp_path / "adapter_model.safetensors")
    info = peftcore.inspect(tmp_path)
    assert info.method is None and "no installed method reads peft_type 'UNHEARD_OF'" in str(info.problem)
    assert (info.parameters, info.bytes) == (6, 24)


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(peftcore.CheckpointError, match=r"does not contain an adapter: adapter_model\.safetensors"):
        peftcore.inspect(tmp_path)
