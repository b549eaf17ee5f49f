"""`--dtype`: what auto chooses with and without instructions for 16 bits, and what the commands compute in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.bases import dtype_choice, models
from peftcore_cli.bases.adapter_folders import Quantization
from support.commands import Run, save_tokenizer

import peftcore
from peftcore import ops
from peftcore.ops import processor

AVX2, ZEN4 = frozenset[torch.dtype](), frozenset({torch.bfloat16})  # the 16-bit dtypes with instructions
SLOW = "this processor has no bf16 instructions, so matrix products in bf16 are slow"
INSTEAD = f"--dtype auto: fp32, not bf16: {SLOW}. Dense weights take twice the memory of bf16"
NAMED = f"{SLOW}. --dtype auto would choose fp32"
METHOD = ("--method", "lora", "--set", "r=4")


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`on(dtypes)`: this processor has instructions for these, and peftcore's layers are no faster than PyTorch."""
    monkeypatch.setattr(ops, "WIDENED", frozenset())
    return lambda dtypes: monkeypatch.setattr(processor, "has_instructions", lambda dtype: dtype in dtypes)


@pytest.fixture(scope="module")
def in_bf16(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama as most checkpoints are: 16 bits, which the config names."""
    folder = tmp_path_factory.mktemp("bf16")
    models.load_model(str(llama), "causal-lm", dtype="bf16", device="cpu").save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def said(output: str) -> str:
    return " ".join(output.split())


@pytest.mark.parametrize(
    ("instructions", "dtype", "stored", "chosen", "instead"),
    [
        (AVX2, "auto", None, "fp32", None),
        (AVX2, "auto", "fp32", "fp32", None),
        (AVX2, "auto", "bf16", "fp32", "bf16"),
        (AVX2, "auto", "fp16", "fp32", "fp16"),
        (AVX2, "fp32", "bf16", "fp32", None),
        (AVX2, "bf16", "bf16", "bf16", None),
        (ZEN4, "auto", "bf16", "bf16", None),
        (ZEN4, "auto", "fp16", "fp32", "fp16"),
        (ZEN4, "bf16", "fp32", "bf16", None),
    ],
)
def test_what_is_chosen(
    on: Any, instructions: frozenset[torch.dtype], dtype: str, stored: str | None, chosen: str, instead: str | None
) -> None:
    on(instructions)
    found = dtype_choice.choose(dtype, "cpu", stored)
    assert (found.dtype, found.replaced_dtype) == (chosen, instead)
    named_and_slow = instructions is AVX2 and dtype == "bf16"
    assert found.is_warning == (dtype == "bf16") and (found.message is not None) == (
        named_and_slow or instead is not None
    )


def test_what_is_said(on: Any) -> None:
    on(AVX2)
    assert dtype_choice.choose("auto", "cpu", "bf16").message == INSTEAD
    assert dtype_choice.choose("bf16", "cpu", "bf16").message == NAMED
    on(ZEN4)
    trained = dtype_choice.choose("auto", "cpu", "bf16", needs_fp32=dtype_choice._TRAINS_BASE)
    assert trained.dtype == "fp32" and "and bf16 would round away small updates. Dense weights" in str(trained.message)
    assert "gradients underflow in fp16" in str(dtype_choice.choose("auto", "cpu", "fp16").message)


def test_layers_that_peftcore_widens_are_said_to_be_spared(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on(AVX2)
    monkeypatch.setattr(ops, "WIDENED", frozenset({torch.bfloat16}))
    wanted = NAMED.replace(". --dtype", "; peftcore's linear layers are not affected. --dtype")
    assert dtype_choice.choose("bf16", "cpu", "bf16").message == wanted


def test_cards_have_their_own_rule(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on(AVX2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has_bf16, chosen in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has_bf16=has_bf16: has_bf16)
        assert dtype_choice.choose("auto", "auto", "fp16") == dtype_choice.Choice(chosen)


@pytest.mark.parametrize(
    ("fields", "stored"),
    [
        ({}, None),
        ({"torch_dtype": "bfloat16"}, "bf16"),
        ({"dtype": "float16"}, "fp16"),
        ({"dtype": "float32"}, "fp32"),
        ({"dtype": "float64"}, None),
    ],
)
def test_the_dtype_of_a_checkpoint_is_its_config_s(tmp_path: Path, fields: dict[str, str], stored: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    assert dtype_choice.config_dtype(models.load_config(str(tmp_path), "causal-lm")) == stored


def test_the_dtype_of_a_text_model_in_a_larger_one(tmp_path: Path) -> None:
    inner = {"model_type": "gemma3_text", "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": inner}))
    assert dtype_choice.config_dtype(models.load_config(str(tmp_path), "causal-lm")) == "bf16"


@pytest.fixture
def loaded_in(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of the bases that commands load."""
    found: list[torch.dtype] = []
    load = models.load_model

    def noting(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        found.append(loaded.dtype)
        return loaded

    monkeypatch.setattr(models, "load_model", noting)
    return found


def test_a_run_and_what_uses_it(
    run: Run, in_bf16: Path, reviews: Path, tmp_path: Path, on: Any, loaded_in: list[torch.dtype]
) -> None:
    """Slow: trained and measured in fp32, with a line. Fast: in bf16. An adapter is used in what it was trained in."""
    arguments = ("-m", in_bf16, "-d", reviews, "--eval-data", reviews, *METHOD, "--steps", 1, "-o")
    on(AVX2)
    slow = run("train", *arguments, tmp_path / "slow")
    assert INSTEAD in said(slow.output) and slow.output.count("--dtype auto") == 1
    on(ZEN4)
    fast = run("train", *arguments, tmp_path / "fast")
    assert "--dtype auto" not in fast.output
    assert loaded_in == [torch.float32, torch.bfloat16]
    tasks = [json.loads((tmp_path / name / "adapter/peftcore_task.json").read_text()) for name in ("slow", "fast")]
    assert [task["dtype"] for task in tasks] == ["fp32", "bf16"]
    assert json.loads((tmp_path / "slow/run.json").read_text())["dtype"] == "auto"
    shown = run("eval", tmp_path / "slow", "-d", reviews).output
    assert "the adapter was trained with the base in fp32" in said(shown)
    after = json.loads((tmp_path / "slow/result.json").read_text())["after"]["loss"]
    assert f"{after:.4f}" in shown
    run("generate", tmp_path / "fast", "-p", "the film is")
    on(AVX2)
    shown = run("generate", tmp_path / "fast", "-p", "the film is").output
    assert INSTEAD in said(shown)
    assert loaded_in[2:] == [torch.float32, torch.bfloat16, torch.float32]


def test_a_named_dtype_is_obeyed(
    run: Run, in_bf16: Path, reviews: Path, tmp_path: Path, on: Any, loaded_in: list[torch.dtype]
) -> None:
    on(AVX2)
    common = ("train", "-m", in_bf16, "-d", reviews, *METHOD, "--steps", 1, "-o")
    named = run(*common, tmp_path / "named", "--dtype", "bf16")
    assert f"warning: {NAMED}" in said(named.output) and loaded_in == [torch.bfloat16]
    mixed = run(*common, tmp_path / "mixed", "--precision", "bf16")
    assert f"{SLOW}. --precision auto with --dtype auto would choose fp32" in said(mixed.output)
    assert loaded_in[1:] == [torch.float32] and "not bf16" not in mixed.output


@pytest.mark.parametrize("method", ["bitfit-like", "full", "classifier"])
def test_what_is_trained_of_the_base_is_in_fp32(
    method: str, in_bf16: Path, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(ZEN4)
    chosen = {
        "bitfit-like": ("lora", "causal-lm", {"modules_to_save": ["lm_head"]}),
        "full": ("full", "causal-lm", {}),
        "classifier": ("lora", "classification", {}),
    }[method]
    settings = dtype_choice.Settings(str(in_bf16), "", chosen[1], chosen[0], chosen[2], device="cpu")
    found = dtype_choice.choose_for_run(settings, ("down", "up"))
    assert (found.dtype, found.replaced_dtype) == ("fp32", "bf16")
    assert "the run trains parameters of the base" in str(found.message)
    plain = dtype_choice.Settings(str(in_bf16), "", "causal-lm", "lora", {}, device="cpu")
    assert dtype_choice.choose_for_run(plain, ()) == dtype_choice.Choice("bf16")


def test_the_error_for_what_does_not_fit_in_fp32_names_bf16(
    run: Run, in_bf16: Path, reviews: Path, tmp_path: Path, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftcore_cli.training import forecast

    on(AVX2)
    monkeypatch.setattr(forecast, "memory_here", lambda: 5e4)
    arguments = ("train", "-m", in_bf16, "-d", reviews, *METHOD, "--steps", 1, "-o", tmp_path / "run")
    assert "paged_adamw_8bit or --dtype bf16, or run anyway with --force" in said(run(*arguments, code=1).output)
    assert "--dtype bf16," not in said(run(*arguments, "--dtype", "bf16", code=1).output)


def test_plan_and_fit_are_of_the_dtype_that_train_takes(run: Run, in_bf16: Path, on: Any) -> None:
    def base(output: str) -> float:
        """kB of the base, as the summary says."""
        return float(re.findall(r"base: [\d,]+ parameters, ([\d.]+) kB", output)[-1])

    arguments = ("plan", "-m", in_bf16, *METHOD, "--batch-size", 1, "--max-length", 12)
    on(AVX2)
    slow = run(*arguments).output
    on(ZEN4)
    fast = run(*arguments).output
    assert INSTEAD in said(slow) and "--dtype auto" not in fast
    assert base(slow) == pytest.approx(2 * base(fast), rel=0.02)
    on(AVX2)
    found = run("suggest", "-m", in_bf16, *METHOD[:2], "--memory", "4GB", "--max-length", 12).output
    assert INSTEAD in said(found) and not found.strip().splitlines()[-1].endswith("bf16")


def test_4_bit_weights_of_a_checkpoint_compute_in_what_is_fast(
    llama: Path, tmp_path: Path, on: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that names bf16 for its products, as those made for cards do."""
    packing = Quantization("nf4", compute_dtype="bfloat16")
    model = models.load_model(str(llama), "causal-lm", dtype="bf16", device="cpu", quantize=packing)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)

    def computes_in(dtype: str) -> set[torch.dtype]:
        loaded = models.load_model(str(tmp_path), "causal-lm", dtype=dtype, device="cpu")
        assert loaded(torch.tensor([[4, 5]])).logits.isfinite().all()
        return {layer.compute_dtype for _, layer in peftcore.quantization.quantized_layers(loaded)}

    on(ZEN4)
    assert computes_in("fp32") == {torch.bfloat16}
    on(AVX2)
    assert computes_in("bf16") == {torch.bfloat16} and capsys.readouterr().err == ""
    assert computes_in("fp32") == {torch.float32}
    line = f"4-bit weights are multiplied in fp32 instead of bf16, the dtype of the checkpoint: {SLOW}"
    assert capsys.readouterr().err.strip() == line


def test_doctor_tells_whether_bf16_has_instructions(run: Run, on: Any) -> None:
    on(AVX2)
    assert "bf16 instructions no: --dtype auto uses fp32" in said(run("doctor").output)
    on(ZEN4)
    assert "bf16 instructions yes" in said(run("doctor").output)
