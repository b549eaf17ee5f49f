"""AdapterTrainer: adapters in checkpoints, methods told of every step, checkpoints that were cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.utils.data import Dataset

import peftcore
from peftcore.integrations.transformers import AdapterTrainer, latest_checkpoint, mark_complete, restore_adapters


class Rows(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(3, 9) + index
        return {"input_ids": ids, "labels": ids}


def trainer(model: torch.nn.Module, folder: Path, **changes: Any) -> AdapterTrainer:
    from transformers import TrainingArguments

    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.05}
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
        **changes,
    )
    return AdapterTrainer(model=model, args=arguments, train_dataset=Rows())


def values(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]


def test_resume_is_exact_with_several_adapters(toys: None, tmp_path: Path) -> None:
    def model() -> torch.nn.Module:
        found = peftcore.apply(tiny.llama(), "around", value=1.5)
        peftcore.apply(found, "after", adapter="second", value=0.1)
        return peftcore.apply(found, "train", adapter="third", names=("model.norm.weight",))

    whole = model()
    trainer(whole, tmp_path / "run").train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    files = {file.relative_to(checkpoint).as_posix() for file in checkpoint.rglob("*") if file.is_file()}
    assert {"adapter_model.safetensors", "second/adapter_model.safetensors", "third/adapter_config.json"} <= files
    assert "model.safetensors" not in files

    resumed = model()
    trainer(resumed, tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    pairs = list(zip(values(whole), values(resumed), strict=True))
    assert len(pairs) == 4 and all(torch.equal(a, b) for a, b in pairs)


def test_the_best_model_is_loaded_at_the_end(toys: None, tmp_path: Path) -> None:
    model = peftcore.apply(tiny.llama(), "around")
    best = trainer(model, tmp_path / "run")
    best.train()
    trained = values(model)
    best.state.best_model_checkpoint = str(tmp_path / "run" / "checkpoint-2")
    best._load_best_model()
    restored = values(model)
    assert not torch.equal(trained[0], restored[0])
    restore_adapters(model, tmp_path / "run" / "checkpoint-4")
    assert all(torch.equal(a, b) for a, b in zip(trained, values(model), strict=True))


def test_methods_are_told_of_every_step_while_gradients_stand(tmp_path: Path) -> None:
    told = []

    def after_step(adapters: Any, config: Any, step: int, total: int) -> None:
        told.append((step, total, all(adapter.gain.grad is not None for adapter in adapters)))

    with tiny.installed(tiny.method("watched", after_step=after_step)):
        trainer(peftcore.apply(tiny.llama(), "watched"), tmp_path, gradient_accumulation_steps=2).train()
    assert told == [(1, 4, True), (2, 4, True), (3, 4, True), (4, 4, True)]


def test_checkpoints_that_were_cut_off_are_skipped(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (1, 2, 10, 20):
        folder = tmp_path / f"checkpoint-{step}" / "inner"
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"12345")
        if step != 20:
            mark_complete(folder.parent)
    (tmp_path / "checkpoint-best").mkdir()
    assert json.loads((tmp_path / "checkpoint-1" / "complete.json").read_text()) == {"inner/file": 5}
    with pytest.warns(UserWarning, match=r"checkpoint-20' was cut off .*complete.json is missing"):
        assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "inner" / "file").write_bytes(b"123")
    mark_complete(tmp_path / "checkpoint-20")
    (tmp_path / "checkpoint-20" / "inner" / "file").unlink()
    with pytest.warns(UserWarning, match=r"inner/file has [03] of 5 bytes") as warned:
        assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert len(warned) == 2


def test_a_save_that_fails_leaves_no_complete_checkpoint(
    toys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(peftcore.apply(tiny.llama(), "around"), tmp_path)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_save_rng_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    with pytest.warns(UserWarning, match="was cut off"):
        assert latest_checkpoint(tmp_path) is None
