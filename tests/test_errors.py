"""Warnings name the line that called peftcore, and the name that was meant is searched for in bounded time."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import peftcore
from peftcore.errors import nearest


def _save_with_trained_base(model: nn.Module, folder: Path) -> None:
    peftcore.apply(model, "lora")
    model.get_parameter("model.norm.weight").requires_grad_(True)
    peftcore.save(model, folder)


def _merge_a_tied_head(model: nn.Module, folder: Path) -> None:
    peftcore.apply(model, "lora", target_modules=["lm_head"], lora_dropout=0.0)
    peftcore.merge(model, untie=True)


def _without_gradients(model: nn.Module, folder: Path) -> None:
    with torch.no_grad():
        peftcore.apply(model, "hra", r=3)


def _quantize_what_is_read_elsewhere(model: nn.Module, folder: Path) -> None:
    peftcore.quantize(nn.Sequential(nn.MultiheadAttention(64, 2), nn.Linear(64, 64)))


@pytest.mark.parametrize(
    "cause", [_save_with_trained_base, _merge_a_tied_head, _without_gradients, _quantize_what_is_read_elsewhere]
)
def test_a_warning_names_the_line_that_called(cause: Callable[[nn.Module, Path], None], tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cause(tiny.gpt2() if cause is _merge_a_tied_head else tiny.llama(), tmp_path)
    lines, first = inspect.getsourcelines(cause)
    calls = [first + number for number, line in enumerate(lines) if "peftcore." in line]
    assert caught and {(each.filename, each.lineno) for each in caught} == {(__file__, calls[-1])}


def test_the_nearest_names_are_found() -> None:
    assert nearest("q_prj", ["q_proj", "k_proj", "down"]) == " (nearest: 'q_proj', 'k_proj')"
    assert nearest("q_prj", ["mlp"]) == ""


def test_few_and_short_ones_of_very_many_and_very_long_names_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    search = difflib.get_close_matches

    def counted(name: str, names: list[str], **options: float) -> list[str]:
        compared.extend(names)
        return search(name, names, **options)

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    many = [f"base_model.model.layers.{i}.self_attn.q_proj.lora_A.weight" for i in range(100_000)]
    long = ["ab" * 50_000, *(f"{i}" + "ba" * 50_000 for i in range(50))]
    assert "self_attn.q_proj.lora_A.weight" in nearest("base_model.model.layers.7.self_attn.q_prj.lora_A.weight", many)
    assert nearest("ba" * 50_000, long) == "" and nearest("ba", long) == ""
    assert 0 < sum(map(len, compared)) < 100_000
