"""The name that was meant is searched for in bounded time."""

from __future__ import annotations

import difflib

import pytest

from peftcore.errors import nearest, nearest_field


def test_the_nearest_names_are_found() -> None:
    assert nearest("q_prj", ["q_proj", "k_proj", "down"]) == " (nearest: 'q_proj', 'k_proj')"
    assert nearest("q_prj", ["mlp"]) == ""


def test_the_field_of_another_library() -> None:
    known = ["r", "lora_alpha", "lora_dropout", "target_modules"]
    assert nearest_field("rank", known) == ". Did you mean 'r'?"
    assert nearest_field("lora_rank", known) == ". Did you mean 'r'?"
    assert nearest_field("dropout", known) == ". Did you mean 'lora_dropout'?"
    assert nearest_field("target_module", known) == " (nearest: 'target_modules')"
    assert nearest_field("zzz", known) == ""
    assert nearest_field("lora_r", known) == nearest_field("rank", known)
    assert nearest_field("alpha", known) == nearest_field("my_lora_alpha", known) == ". Did you mean 'lora_alpha'?"


def test_swapped_letters_and_case() -> None:
    assert nearest("Lroa", ["relora", "road", "lora"]) == " (nearest: 'lora', 'road', 'relora')"
    assert nearest("LORA_ALHPA", ["lora_alpha"]) == " (nearest: 'lora_alpha')"


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
