"""`train --adapter`: training goes on from an adapter that is there; what contradicts it is refused."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.settings import Settings
from peftcore_cli.training import warm_start
from safetensors.torch import load_file
from support.commands import Run, save_tokenizer, write_jsonl

import peftcore

METHOD = ("--method", "lora", "--set", "r=4", "--set", "target_modules=all-linear")
STEPS = ("--batch-size", 4, "--lr", "0.02", "--eval-every", 99, "--save-every", 99, "--steps")
ANSWERS = {"good": "much fun with heart", "bad": "no story and dull"}


def result_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "result.json").read_text())


def tensors_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def same(*runs: Path) -> bool:
    first, second = map(tensors_of, runs)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def first(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a language model, and its data beside it."""
    from peftcore_cli.app import build
    from typer.testing import CliRunner

    folder = tmp_path_factory.mktemp("first")
    rows = [{"prompt": f"the {word} film is", "completion": answer} for word, answer in ANSWERS.items() for _ in "1234"]
    data = write_jsonl(folder / "rows.jsonl", rows)
    words = ["train", "-m", llama, "-d", data, "--eval-data", data, "-o", folder / "run", *METHOD, *STEPS, 4]
    result = CliRunner().invoke(build([]), [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.fixture
def more(tmp_path: Path) -> Path:
    rows = [{"prompt": f"a {word} story was", "completion": answer} for word, answer in ANSWERS.items() for _ in "1234"]
    return write_jsonl(tmp_path / "more.jsonl", rows)


def test_it_begins_where_the_adapter_ended(run: Run, first: Path, more: Path, tmp_path: Path) -> None:
    """Base and method are the adapter's; the first loss is that of the adapter, and its file is left as it was."""
    before = tensors_of(first)
    rate = ("--lr", "1e-12", "--warmup", 0, "--sample", "a bad story was", "--sample-tokens", 3)
    run("train", "-a", first, "-d", more, "--eval-data", more, "-o", tmp_path / "still", "--steps", 1, *rate)
    evaluated = run("eval", first, "-d", more).output
    still = result_of(tmp_path / "still")
    assert f"{still['before']['loss']:.4f}" in evaluated, "the adapter's loss, not the base's"
    assert [writer for writer, _ in still["samples"]] == ["the adapter before", "with the adapter"]
    after = tensors_of(tmp_path / "still")
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-9, rtol=0)

    run("train", "-a", first, "-d", more, "--eval-data", more, "-o", tmp_path / "on", *STEPS, 6)
    found = result_of(tmp_path / "on")
    assert found["before"] == pytest.approx(still["before"]) and found["after"]["loss"] < 0.7 * found["before"]["loss"]
    assert all(torch.equal(value, before[name]) for name, value in tensors_of(first).items())
    settings = json.loads((tmp_path / "on" / "run.json").read_text())
    assert settings["method"] == "lora" and settings["adapter"] == str(first / "adapter")

    run("train", "--config", tmp_path / "on" / "run.toml", "-o", tmp_path / "again")
    assert same(tmp_path / "on", tmp_path / "again")


def test_resume_goes_on_with_such_a_run_too(run: Run, first: Path, more: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for output in (whole, parts):  # the first run's file is no contradiction: it says how the adapter was made
        config = ("--config", first / "run.toml", "-a", first, "-d", more)
        arguments = ("train", *config, "-o", output, "--steps", 4, "--save-every", 2)
        run(*arguments)
    (parts / "checkpoints" / "checkpoint-4" / "complete.json").unlink()
    assert "resuming from" in run(*arguments, "--resume").output
    assert same(whole, parts)
    assert "resuming from" in run("train", "-o", parts, "--resume").output  # the run's file has its options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "ia3"), "'ia3' reads peft_type 'IA3'"),
        (("--set", "r=8"), "--set r=8 contradicts the adapter in"),
        (("--set", "target_modules=q_proj"), "which has target_modules="),
        (("--task", "classification"), "was trained for causal-lm, but --task is classification"),
        (("--model", "{other}"), "was trained on another base: the values of"),
        (("--output", "{first}"), "replace --adapter with --resume. To train its adapter on new data"),
        (("--output", "{first}", "--overwrite"), "replace --adapter with --resume. To train its adapter on new data"),
        (("--data", "{labelled}"), "labelled.jsonl' is for classification. To train a new adapter"),
    ],
)
def test_what_contradicts_the_adapter(
    run: Run, first: Path, more: Path, labelled: Path, llama: Path, tmp_path: Path, arguments: Any, message: str
) -> None:
    from transformers import AutoModelForCausalLM

    other = tmp_path / "other"
    if "{other}" in arguments:
        model = AutoModelForCausalLM.from_pretrained(llama)
        torch.nn.init.normal_(model.model.layers[1].self_attn.q_proj.weight)
        model.save_pretrained(other)
        save_tokenizer(other)
    words = [word.format(other=other, first=first, labelled=labelled) for word in arguments]
    data = () if "--data" in words else ("-d", more)
    error = run("train", "-a", first, *data, "-o", tmp_path / "run", "--steps", 1, *words, code=1).output
    assert message in error and "Traceback" not in error
    assert (first / "adapter" / "adapter_config.json").exists()


def test_what_is_missing(run: Run, llama: Path, more: Path, tmp_path: Path) -> None:
    assert (
        "Pass a model (--model MODEL), or an adapter" in run("train", "-d", more, "-o", tmp_path / "a", code=1).output
    )
    labels = run("train", "-m", llama, "-d", more, "-o", tmp_path / "a", "--labels", "a,b", code=1).output
    assert "--labels only works with an existing adapter" in labels
    other = run("train", "-m", llama, "-d", more, "-o", tmp_path / "a", "--precision", "bf8", code=1)
    assert "--precision must be one of auto" in other.output


def test_a_classifier_keeps_its_labels(run: Run, bert: Path, labelled: Path, tmp_path: Path) -> None:
    """The head's outputs stay what they are, also where new data has one label alone, or a label that is new."""
    arguments = ("--eval-data", labelled, "--method", "lora", *STEPS, 4)
    run("train", "-m", bert, "-d", labelled, "-o", tmp_path / "a", *arguments)
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    up = write_jsonl(tmp_path / "up.jsonl", [row for row in rows if row["label"] == "up"])
    run("train", "-a", tmp_path / "a", "-d", up, "--eval-data", labelled, "-o", tmp_path / "b", "--steps", 1)
    found = result_of(tmp_path / "b")
    assert found["before"] == pytest.approx(result_of(tmp_path / "a")["after"]) and found["labels"] == ["down", "up"]
    strange = write_jsonl(tmp_path / "strange.jsonl", [{"text": "a", "label": "upp"}] * 2)
    error = run("train", "-a", tmp_path / "a", "-d", strange, "-o", tmp_path / "c", code=1).output
    assert "unknown label 'upp' (nearest: 'up'). The model's labels are down, up" in error


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
def test_an_adapter_that_peft_trained(run: Run, bert: Path, labelled: Path, tmp_path: Path) -> None:
    """As `PeftModel.from_pretrained(..., is_trainable=True)`: the values are theirs, and they load what comes of it."""
    from peft import LoraConfig, PeftModel, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(bert), LoraConfig(task_type=TaskType.SEQ_CLS, r=2)
    )
    model.save_pretrained(tmp_path / "theirs")
    arguments = ("-d", labelled, "--eval-data", labelled, "--labels", "down,up", *STEPS, 8)
    run("train", "-a", tmp_path / "theirs", *arguments, "-o", tmp_path / "run")
    found = result_of(tmp_path / "run")
    shown = run("eval", tmp_path / "theirs", "-d", labelled, "--labels", "down,up").output
    assert f"{found['before']['loss']:.4f}" in shown and found["after"]["loss"] < found["before"]["loss"]
    again = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(bert), tmp_path / "run/adapter"
    )
    ours = peftcore.load(AutoModelForSequenceClassification.from_pretrained(bert), tmp_path / "run/adapter")
    tokens = torch.tensor([[4, 5, 6, 7]])
    torch.testing.assert_close(again.eval()(tokens).logits, ours.eval()(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL calls what transformers has deprecated
def test_preferences_are_measured_against_the_adapter_as_it_was(run: Run, first: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"the {w} film is", "chosen": ANSWERS[w], "rejected": "not very good"} for w in ANSWERS] * 2
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    run("train", "-a", first, "-d", data, "--eval-data", data, "-o", tmp_path / "run", *STEPS, 4)
    found = result_of(tmp_path / "run")
    assert found["before"] == {"loss": pytest.approx(math.log(2)), "preference_accuracy": 0.0, "margin": 0.0}
    state = json.loads((tmp_path / "run/checkpoints/checkpoint-4/trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5), "Trainer's reference is the same one"
    assert found["after"]["margin"] > 0.1


def test_a_base_in_4_bits_is_so_again(run: Run, llama: Path, more: Path, tmp_path: Path) -> None:
    method = ("--method", "qlora", "--set", "r=4", "--set", "blocksize=32")
    run("train", "-m", llama, "-d", more, "--eval-data", more, "-o", tmp_path / "a", *method, *STEPS, 4)
    run("train", "-a", tmp_path / "a", "-d", more, "--eval-data", more, "-o", tmp_path / "b", *STEPS, 1)
    settings = json.loads((tmp_path / "b" / "run.json").read_text())
    assert settings["method"] == "qlora" and settings["fields"] == {"r": 4, "blocksize": 32}
    assert result_of(tmp_path / "b")["before"] == pytest.approx(result_of(tmp_path / "a")["after"])
    error = run("train", "-a", tmp_path / "a", "-d", more, "-o", tmp_path / "c", "--set", "blocksize=64", code=1).output
    assert "--set blocksize=64 contradicts the adapter in" in error and "which has blocksize=32" in error


def test_several_in_one_folder_are_none(run: Run, llama: Path, more: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    for name in ("default", "other"):
        peftcore.apply(model, "lora", r=2, adapter=name)
    peftcore.save(model, tmp_path / "both")
    error = run("train", "-a", tmp_path / "both", "-d", more, "-o", tmp_path / "run", "--steps", 1, code=1).output
    assert "contains several adapters: default, other. Pass the folder of a single adapter" in error


@pytest.mark.parametrize("kind", ["pipe", "nested", "list", "types", "rate"])
def test_a_strangers_run_is_not_trusted(tmp_path: Path, kind: str) -> None:
    folder, file = tmp_path / "adapter", tmp_path / "run.json"
    folder.mkdir()
    good = Settings("m", "d", "causal-lm", "lora").to_json()
    file.write_text(json.dumps(good))
    assert warm_start.settings_of_adapter(folder) == Settings("m", "d", "causal-lm", "lora")
    if kind == "pipe":
        file.unlink()
        os.mkfifo(file)
    else:
        deep = "[" * 50_000
        texts = {"nested": deep, "list": "[]", "types": json.dumps({**good, "method": ["lora"]})}
        file.write_text({**texts, "rate": json.dumps({**good, "lr": "x"})}[kind])
    assert warm_start.settings_of_adapter(folder) is None
