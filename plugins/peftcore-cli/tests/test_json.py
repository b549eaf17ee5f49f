"""`--json`: one document on standard output, with the figures of the tables."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli import console
from peftcore_cli.bases.adapter_folders import TASK_FILE, AdapterTask
from support.commands import Run
from transformers import AutoModelForCausalLM

import peftcore


@pytest.fixture
def document(run: Run) -> Any:
    def call(*arguments: Any) -> Any:
        return json.loads(run(*arguments, "--json").stdout)

    return call


def test_installed(document: Any) -> None:
    listed = {method["name"]: method for method in document("methods")["methods"]}
    assert listed["lora"]["description"].startswith("LoRA (Hu et al. 2021")
    plugin = next(each for each in document("plugins")["plugins"] if each["name"] == "lora")
    assert plugin["distribution"] == "peftcore-lora" and "peftcore_methods" in plugin["hooks"]
    assert plugin["methods"] == ["lora"] and plugin["error"] is None


def test_fields_of_a_method(document: Any) -> None:
    found = document("methods", "lora")
    fields = {field["name"]: field for field in found["fields"]}
    assert found["name"] == "lora"
    assert fields["r"] == {"name": "r", "takes": "a whole number", "default": 8, "required": False}


def test_methods_for_a_model(document: Any, llama: Path) -> None:
    found = {each["name"]: each for each in document("methods", "--for", llama)["methods"]}
    planned = peftcore.plan(AutoModelForCausalLM.from_pretrained(llama), "lora")
    assert found["lora"]["trainable_parameters"] == planned.trainable_parameters
    assert found["lora"]["trainable_bytes"] == planned.trainable_bytes and found["lora"]["error"] is None
    assert found["bitfit"]["trainable_bytes"] is None and "lacks biases to train" in found["bitfit"]["error"]


def test_info(document: Any, llama: Path, tmp_path: Path) -> None:
    model = peftcore.apply(AutoModelForCausalLM.from_pretrained(llama), "lora", r=2)
    found = document("info", peftcore.save(model, tmp_path / "saved"))
    assert found["method"] == "lora" and found["problem"] is None and found["fields"]["r"] == 2
    assert (
        found["parameters"]
        == peftcore.plan(AutoModelForCausalLM.from_pretrained(llama), "lora", r=2).trainable_parameters
    )
    assert {"shape": [2, 32], "dtype": "torch.float32"} in found["parts"][""].values()
    assert found["trained_for"] is None
    AdapterTask("causal-lm", 9).write(tmp_path / "saved")
    assert document("info", tmp_path / "saved")["trained_for"]["max_length"] == 9
    (tmp_path / "saved" / TASK_FILE).write_text("{}")
    assert "the field 'task' is missing" in document("info", tmp_path / "saved")["problem"]


def test_plan(document: Any, llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    found = document("plan", "-m", llama, "--method", "lora", "--set", "r=2", "--batch-size", 2, "--max-length", 8)
    assert found["config"]["r"] == 2 and found["memory_unknown"] is None
    assert found["trainable_parameters"] == sum(placement["parameters"] for placement in found["placements"])
    step = peftcore.Step(batch_size=2, length=8, optimizer="adamw_torch")
    assert found["memory"]["parts"]["base"] == peftcore.estimate(model, "lora", r=2, step=step).parts["base"]
    assert found["memory"]["process"]["low"] <= found["memory"]["process"]["high"] and found["memory"]["card"] is None


def test_suggest(document: Any, llama: Path) -> None:
    found = document("suggest", "-m", llama, "--method", "lora", "--rank", 2, "--device", "t4", "--max-length", 8)
    (way,) = found["ways"][:1]
    assert way["fields"] == {"r": 2} and way["memory"]["high"] <= found["memory"]
    assert f"train -m {llama} -d DATA -o RUN --method lora --set r=2" in way["command"]


def test_eval(document: Any, run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    model = peftcore.apply(AutoModelForCausalLM.from_pretrained(llama), "lora", r=2)
    adapter = peftcore.save(model, tmp_path / "saved")
    found = document("eval", adapter, "-d", reviews, "-m", llama)
    assert found["examples"] == 14 and found["base"].keys() == {"loss", "perplexity"}
    assert f"{found['adapter']['loss']:.4f}" in run("eval", adapter, "-d", reviews, "-m", llama).output


def test_doctor(document: Any) -> None:
    found = document("doctor")
    assert found["torch"] == str(torch.__version__) and found["libraries"]["transformers"] == version("transformers")
    assert found["extension"]["available"] and "lora" in found["methods"]


def test_numbers_that_json_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"loss": float("nan"), "figures": [float("inf"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "figures": [None, 1.5]}


def test_an_error_is_no_document(run: Run, tmp_path: Path) -> None:
    result = run("info", tmp_path / "nothing", "--json", code=1)
    assert result.stdout == "" and "does not exist" in result.stderr
