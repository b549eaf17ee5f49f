"""`train --method qlora`: the base in 4 bits, the adapter an ordinary one of LoRA that every command takes."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import Run
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peftcore

METHOD = ("--method", "qlora", "--set", "r=4", "--set", "lora_alpha=8", "--set", "blocksize=32")
STEPS = ("--batch-size", 4, "--lr", "0.02", "--save-every", 2, "--eval-every", 3, "--steps")


def test_train_and_use(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run("train", "-m", llama, "-d", reviews, "-o", output, "--eval-data", reviews, *METHOD, *STEPS, 6)
    found = json.loads((output / "result.json").read_text())
    assert found["after"]["loss"] < 0.7 * found["before"]["loss"]
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and "blocksize" not in config
    run("eval", output / "adapter", "-d", reviews)
    run("generate", output / "adapter", "-p", "the film is good")
    run("merge", output / "adapter", "--output", tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize("fields", [{}, {"skip": ["mlp"], "double_quant": False, "blocksize": 32}])
def test_the_base_is_packed_as_it_is_read(llama: Path, fields: dict[str, object]) -> None:
    """Never dense as a whole, and bit for bit what `apply` makes of a dense one."""
    from peftcore_cli.bases import base_quantization, models

    packing = base_quantization.by_method("qlora", fields, str(llama), "causal-lm", ())
    loaded = models.load_model(str(llama), "causal-lm", dtype="fp32", device="cpu", quantize=packing)
    dense = models.load_model(str(llama), "causal-lm", dtype="fp32", device="cpu")
    assert len([*peftcore.quantization.quantized_layers(loaded)]) == (9 if fields else 14)
    wanted = peftcore.apply(dense, "qlora", **fields).state_dict()
    found = peftcore.apply(loaded, "qlora", **fields).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found if "lora_A" not in name)  # which is drawn
    assert base_quantization.by_method("lora", {}, str(llama), "causal-lm", ()) is None


def held_out_losses(output: str) -> list[float]:
    """(the base's, with the adapter) from what `eval` prints."""
    return [float(word) for word in next(line for line in output.splitlines() if "loss" in line).split()[-2:]]


@pytest.mark.parametrize("target", ["all-linear", "q_proj"])
def test_the_base_in_4_bits_again(run: Run, llama: Path, reviews: Path, tmp_path: Path, target: str) -> None:
    """Commands evaluate and merge what was trained; layers that the adapter leaves alone come out dense too."""
    output = tmp_path / "run"
    method = ("--method", "qlora", "--set", "r=4", "--set", f"target_modules={target}")
    printed = run("train", "-m", llama, "-d", reviews, "-o", output, "--eval-data", reviews, *method, *STEPS, 6).output
    assert "--quantize" not in printed  # the commands that use the adapter read its record
    found = json.loads((output / "result.json").read_text())
    given = (output / "adapter",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # about a base other than the one it was trained on
        losses = held_out_losses(run("eval", *given, "-d", reviews).output)
    assert losses == pytest.approx([found["before"]["loss"], found["after"]["loss"]], abs=1e-4)
    run("generate", *given, "-p", "the film is good", "--max-new-tokens", 2)

    run("merge", *given, "--output", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    wanted = peftcore.quantize(AutoModelForCausalLM.from_pretrained(llama))
    untouched = "model.layers.0.mlp.up_proj" if target == "q_proj" else "lm_head"
    expected = wanted.get_submodule(untouched)
    dense = expected.dequantized() if target == "q_proj" else expected.weight
    assert torch.equal(model.get_submodule(untouched).weight, dense)
    assert not any("absmax" in name for name in model.state_dict())
    assert not hasattr(model.config, "quantization_config")
    dense_losses = held_out_losses(run("eval", *given, "--quantize", "none", "-d", reviews).output)
    assert abs(dense_losses[0] - losses[0]) > 1e-4  # the dense base is another one


def test_a_classifier_on_a_base_in_4_bits(run: Run, bert: Path, labelled: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    method = ("--method", "qlora", "--set", "r=4")
    run("train", "-m", bert, "-d", labelled, "-o", output, "--eval-data", labelled, *method, *STEPS, 6)
    found = json.loads((output / "result.json").read_text())
    given = (output / "adapter", "--quantize", "nf4")
    loss = held_out_losses(run("eval", *given, "-d", labelled).output)[1]
    assert loss == pytest.approx(found["after"]["loss"], abs=1e-4)
    assert run("generate", *given, "-p", "the story is good").output.strip().startswith(("up", "down"))


def test_a_base_that_is_stored_in_4_bits(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    """In bitsandbytes' format: read with its bits and without that library, whose layers can lose gradients."""
    base, output = tmp_path / "base", tmp_path / "run"
    shutil.copytree(llama, base)
    stored = peftcore.quantize(AutoModelForCausalLM.from_pretrained(llama), skip=["lm_head", "o_proj"])
    stored.save_pretrained(base)
    assert json.loads((base / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    run("train", "-m", base, "-d", reviews, "-o", output, "--eval-data", reviews, "--method", "lora", *STEPS, 6)
    found = json.loads((output / "result.json").read_text())
    assert found["after"]["loss"] < 0.9 * found["before"]["loss"]
    losses = held_out_losses(run("eval", output, "-d", reviews).output)
    assert losses == pytest.approx([found["before"]["loss"], found["after"]["loss"]], abs=1e-4)
    run("merge", output, "--output", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = peftcore.merge(peftcore.load(stored, output / "adapter"), dtype=torch.float32).state_dict()
    assert all(torch.equal(merged.state_dict()[name], adapted[name]) for name in adapted if "_proj" in name)


def test_any_method_on_a_base_in_4_bits(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    """What --quantize trains is what `eval` measures, and a run that continues it keeps the 4 bits."""
    output, data = tmp_path / "run", ("-d", reviews, "--eval-data", reviews)
    printed = run("train", "-m", llama, *data, "-o", output, "--method", "ia3", "--quantize", "nf4", *STEPS, 6).output
    assert f"eval {output / 'adapter'}" in printed and "memory is not predicted" not in printed
    found = json.loads((output / "result.json").read_text())
    assert found["after"]["loss"] < found["before"]["loss"]
    losses = held_out_losses(run("eval", output, "-d", reviews).output)
    assert losses == pytest.approx([found["before"]["loss"], found["after"]["loss"]], abs=1e-4)
    run("train", "-a", output, *data, "-o", tmp_path / "further", *STEPS, 2)
    further = json.loads((tmp_path / "further" / "result.json").read_text())
    assert further["before"]["loss"] == pytest.approx(found["after"]["loss"], abs=1e-5)
    assert json.loads((tmp_path / "further" / "run.json").read_text())["quantize"] == "nf4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--method", "qlora", "--quantize", "nf4"),
            "--method qlora prepares the base itself, so it cannot be combined with --quantize nf4",
        ),
        (("--method", "lora", "--quantize", "nf3"), "unknown quant_type 'nf3'. Choose one of: nf4, fp4"),
        (("--method", "lora", "--quantize", "nf4", "--fit"), "--fit only works with a dense base"),
    ],
)
def test_quantize_is_refused(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    output = run("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", *arguments, code=1).output
    assert message in " ".join(output.split())


def test_skip_is_a_field_of_qlora(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    """Python's `skip` in an error is not an option of a command, but a field of a method."""
    config = json.loads((llama / "config.json").read_text())
    config["intermediate_size"] = 80
    odd = tmp_path / "odd"
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(odd)
    for file in llama.glob("*token*"):
        shutil.copy(file, odd)
    arguments = ("train", "-m", odd, "-d", reviews, "-o", tmp_path / "run", "--steps", 1)
    output = " ".join(run(*arguments, "--method", "lora", "--quantize", "mxfp4", code=1).output.split())
    assert "skip=['lm_head', 'down_proj'], or choose nf4. For `peftcore train`, skip" in output
    assert "--method qlora --set quant_type=mxfp4 --set skip=NAME,NAME. Other commands use the values" in output
    method = ("--method", "qlora", "--set", "quant_type=mxfp4", "--set", "skip=lm_head,down_proj")
    run(*arguments, "--eval-data", reviews, *method)
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    losses = held_out_losses(run("eval", tmp_path / "run", "-d", reviews).output)
    assert losses == pytest.approx([found["before"]["loss"], found["after"]["loss"]], abs=1e-4)
    run("merge", tmp_path / "run", "--output", tmp_path / "merged")


def test_an_unknown_4_bit_type(run: Run, llama: Path, tmp_path: Path) -> None:
    output = run("generate", "-m", llama, "--quantize", "int4", "-p", "the", code=1).output
    assert "unknown quant_type 'int4'. Choose one of: nf4, fp4" in " ".join(output.split())


def test_a_classifier(run: Run, bert: Path, labelled: Path, tmp_path: Path) -> None:
    output = tmp_path / "classifier"
    run("train", "-m", bert, "-d", labelled, "-o", output, "--eval-data", labelled, *METHOD, *STEPS, 6)
    names = load_file(output / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in names
    run("eval", output / "adapter", "-d", labelled)


def test_resume_is_bit_exact(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    results = []
    for name in ("whole", "parts"):
        output = tmp_path / name
        arguments = ("train", "-m", llama, "-d", reviews, "-o", output, "--eval-data", reviews, *METHOD, *STEPS, 4)
        run(*arguments)
        if name == "parts":  # the last checkpoint is lost
            (output / "checkpoints" / "checkpoint-4" / "complete.json").unlink()
            run(*arguments, "--resume")
        results.append(load_file(output / "adapter" / "adapter_model.safetensors"))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.fixture
def skipping(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> Path:
    """Return the folder of a run of QLoRA whose `down_proj` is dense."""
    fields = ("--set", "skip=lm_head,down_proj", "--set", "blocksize=128", "--set", "double_quant=false")
    arguments = ("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", "--eval-data", reviews)
    run(*arguments, "--method", "qlora", "--set", "r=4", *fields, *STEPS, 4)
    return tmp_path / "run"


def test_commands_quantize_as_the_record_says(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, skipping: Path
) -> None:
    recorded = json.loads((skipping / "adapter" / "peftcore_task.json").read_text())["quantized"]
    down = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    kind = {"quant_type": "nf4", "blocksize": 128, "double_quant": False, "compute_dtype": None}
    assert recorded == {**kind, "skip": ["lm_head", *down]}

    found = json.loads((skipping / "result.json").read_text())
    wanted = pytest.approx([found["before"]["loss"], found["after"]["loss"]], abs=1e-4)
    moved = tmp_path / "moved"
    shutil.copytree(skipping / "adapter", moved)  # without the run's settings
    shown = " ".join(run("info", moved).output.split())
    assert "base in training quantized as nf4 (blocksize=128, double_quant=False, 3 weights dense)" in shown
    for folder in (skipping, moved, skipping / "checkpoints" / "checkpoint-4"):
        assert held_out_losses(run("eval", folder, "-d", reviews).output) == wanted
    assert held_out_losses(run("eval", moved, "-d", reviews, "--quantize", "nf4").output) == wanted

    run("merge", moved, "--output", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = peftcore.quantization.load(llama, dtype=torch.float32, **{**recorded, "compute_dtype": None})
    adapted = peftcore.merge(peftcore.load(base, moved), dtype=torch.float32)
    for path in (down[0], "model.layers.0.self_attn.q_proj"):
        assert torch.equal(merged.get_submodule(path).weight, adapted.get_submodule(path).weight)

    output = run("eval", moved, "-d", reviews, "--quantize", "fp4", code=1).output
    assert (
        f"--quantize fp4 contradicts the adapter '{moved}', which was trained on a base quantized as nf4 "
        "(blocksize=128, double_quant=False, 3 weights dense). Remove --quantize, or pass --quantize none"
    ) in " ".join(output.split())


def test_training_continues_on_the_base_that_the_record_says(
    run: Run, reviews: Path, tmp_path: Path, skipping: Path
) -> None:
    moved, after = tmp_path / "moved", json.loads((skipping / "result.json").read_text())["after"]["loss"]
    shutil.copytree(skipping / "adapter", moved)
    given = ("train", "-a", moved, "-d", reviews, "--eval-data", reviews, *STEPS, 1)
    for name, method in (("lora", ()), ("qlora", ("--method", "qlora"))):
        run(*given, "-o", tmp_path / name, *method)
        assert json.loads((tmp_path / name / "result.json").read_text())["before"]["loss"] == pytest.approx(
            after, abs=1e-5
        )
        records = [
            json.loads((each / "peftcore_task.json").read_text()) for each in (moved, tmp_path / name / "adapter")
        ]
        assert records[0]["quantized"] == records[1]["quantized"]
    qlora = ("--method", "qlora", "--set")
    run(*given, "-o", tmp_path / "same", *qlora, "skip=down_proj,lm_head", "--set", "blocksize=128")
    for field in ("blocksize=64", "skip=up_proj", "quant_type=fp4"):
        output = " ".join(run(*given, "-o", tmp_path / "other", *qlora, field, code=1).output.split())
        assert f"--set {field.partition('=')[0]}=" in output and f"contradicts the adapter in '{moved}'" in output
    output = run(*given, "-o", tmp_path / "other", "--quantize", "fp4", code=1).output
    assert f"--quantize fp4 contradicts the adapter '{moved}'" in " ".join(output.split())


def test_adapters_of_different_bases_are_not_mixed(skipping: Path) -> None:
    from peftcore_cli.bases import base_quantization
    from peftcore_cli.bases.adapter_folders import AdapterTask, adapter_task

    from peftcore.errors import PeftcoreError

    tasks = {"a": adapter_task(skipping / "adapter"), "b": AdapterTask("causal-lm", 64)}
    with pytest.raises(
        PeftcoreError, match=r"'a' was trained on a base quantized as nf4 .* 'b' on a base without a record"
    ):
        base_quantization.of_adapters(None, tasks)
    assert base_quantization.of_adapters("none", tasks) is None
    assert base_quantization.of_adapters("nf4", tasks) == tasks["a"].quantized
    assert base_quantization.of_adapters(None, {"a": tasks["a"], "c": tasks["a"]}) == tasks["a"].quantized


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("nf4", "quantized must be a JSON object with a list of names to skip, found 'nf4'"),
        ({"quant_type": "nf4", "skip": [1]}, "quantized must be a JSON object with a list of names to skip"),
        ({"quant_type": "nf4", "blocksize": "64"}, "blocksize must be a whole number, found '64'"),
        ({"quant_type": "nf4", "compute_dtype": "Tensor"}, "compute_dtype must be float32, bfloat16 or float16"),
        ({"blocksize": 64}, "quant_type"),
        ({"quant_type": "nf4", "more": 1}, "more"),
    ],
)
def test_damaged_records_are_refused(tmp_path: Path, record: object, message: str) -> None:
    from peftcore_cli.bases.adapter_folders import AdapterTask, adapter_task

    from peftcore.errors import CheckpointError

    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({}, tmp_path / "adapter_model.safetensors")
    AdapterTask("causal-lm", 64).write(tmp_path)
    file = tmp_path / "peftcore_task.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantized": record}))
    with pytest.raises(CheckpointError, match=message):
        adapter_task(tmp_path)
