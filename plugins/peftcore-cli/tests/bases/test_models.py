"""What an adapter folder says of its task."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.bases.adapter_folders import TASK_FILE, AdapterTask, adapter_task, base_of
from peftcore_cli.bases.models import load_config, load_model
from safetensors.torch import load_file, save_file
from support.commands import Run

from peftcore import CheckpointError, PeftcoreError


def test_a_folder_without_an_adapter(tmp_path: Path, run: Run) -> None:
    (tmp_path / "empty").mkdir()
    assert "is empty. Pass the folder of a run" in run("eval", tmp_path / "empty", "-d", "a.jsonl", code=1).output
    (tmp_path / "run" / "checkpoints" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "checkpoint-10").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    said = run("eval", tmp_path / "run", "--data", "a.jsonl", code=1).output
    assert (
        "has no adapter yet" in said and "--resume, or pass its newest checkpoint" in said and "checkpoint-10" in said
    )


def test_a_task_file_that_names_no_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({}, tmp_path / "adapter_model.safetensors")
    fields = {"task": "classification", "max_length": 7, "labels": ["a", "b"]}
    (tmp_path / TASK_FILE).write_text(json.dumps(fields))
    assert adapter_task(tmp_path) == AdapterTask("classification", 7, ("a", "b"), chat=False)
    (tmp_path / TASK_FILE).write_text(json.dumps({**fields, "task": "chat"}))
    with pytest.raises(CheckpointError, match=r"task must be one of causal-lm, .*, found 'chat'. Delete the file"):
        adapter_task(tmp_path)


@pytest.mark.parametrize("told", [[], 3, None, "x", {}, {"task": "causal-lm"}, {"task": ["x"], "max_length": 1}])
def test_a_task_file_of_other_types_is_refused(tmp_path: Path, told: Any) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({}, tmp_path / "adapter_model.safetensors")
    (tmp_path / TASK_FILE).write_text(json.dumps(told))
    with pytest.raises(
        CheckpointError,
        match=rf"{TASK_FILE}': the (file must contain a JSON object|field '.*' is missing).*Delete the file",
    ):
        adapter_task(tmp_path)


def test_thousands_of_labels_need_a_head_of_as_many_rows(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({}, tmp_path / "adapter_model.safetensors")
    labels = [str(i) for i in range(2_000)]
    (tmp_path / TASK_FILE).write_text(json.dumps({"task": "classification", "max_length": 7, "labels": labels}))
    save_file({"score.weight": torch.ones(1_999, 1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"has 2,000 labels, but no tensor of the adapter has 2,000 rows"):
        adapter_task(tmp_path)
    save_file({"score.weight": torch.ones(2_000, 1)}, tmp_path / "adapter_model.safetensors")
    assert adapter_task(tmp_path).labels == tuple(labels)


def test_a_config_of_other_types_says_what_is_wrong(tmp_path: Path) -> None:
    fields = {"peft_type": "LORA", "task_type": "SEQ_CLS", "modules_to_save": 3, "base_model_name_or_path": ["x"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    save_file({"a.classifier.weight": torch.tensor(1.0)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"modules_to_save in '.*' must be a list of names, found 3"):
        adapter_task(tmp_path)
    with pytest.raises(PeftcoreError, match="does not record its base"):
        base_of(tmp_path, None)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "modules_to_save": None}))
    with pytest.raises(CheckpointError, match="has no classification head"):
        adapter_task(tmp_path)


def test_weights_that_a_checkpoint_lacks_are_named(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """transformers draws them at random, and its own notice is not shown."""
    shutil.copytree(llama, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    for folder, warned in ((llama, False), (tmp_path / "base", True)):
        for task in ("causal-lm", "classification"):
            load_model(str(folder), task, dtype="fp32", device="cpu", labels=("a", "b"))
            shown = " ".join("".join(capsys.readouterr()).split())
            assert (
                "lacks model.layers.1.mlp.up_proj.weight, so these weights are initialised at random" in shown
            ) is warned


def test_a_model_of_another_kind_is_refused(llama: Path, bert: Path) -> None:
    for folder, task, message in (
        (llama, "seq2seq", r"needs an encoder-decoder model .*\(llama\)"),
        (llama, "image", "needs a model that classifies images"),
        (bert, "causal-lm", "needs a decoder, found the encoder"),
        (bert, "dpo", "needs a decoder"),
    ):
        with pytest.raises(PeftcoreError, match=message):
            load_config(str(folder), task)
    for folder, task in ((llama, "classification"), (bert, "tags"), (llama, "reward"), (bert, "pairs")):
        load_config(str(folder), task)


def test_code_of_a_model_is_not_run(tmp_path: Path, run: Run) -> None:
    """Not asked about at a terminal, either."""
    from transformers import dynamic_module_utils

    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemError('was run')\n")
    output = " ".join(run("generate", "-m", tmp_path, "-p", "the", code=1).output.split())
    assert (
        "repository has its own code, which is not run by default. Read the code, and pass --trust-remote-code"
        in output
    )
    assert dynamic_module_utils.TIME_OUT_REMOTE_CODE == 0
