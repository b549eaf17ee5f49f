"""What a resolved config says: layers by name, where PEFT has no other way to say them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from support import tiny
from torch import nn

import peftcore
from peftcore.model import detect, targets

LLAMA, GPT2 = tiny.llama(), tiny.gpt2()


@dataclass(frozen=True)
class Lacking(targets.LayersConfig):
    not_in_peft = frozenset({"exclude_modules", "fan_in_fan_out"})


def resolved(config: targets.LayersConfig, model: nn.Module = LLAMA) -> targets.LayersConfig:
    return config.resolved(model, detect(model))


def test_what_peft_cannot_say_is_worked_into_the_names() -> None:
    config = Lacking(target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.q_proj"])
    found = resolved(config)
    assert found.exclude_modules is None and found.selected(LLAMA, detect(LLAMA)) == config.selected(
        LLAMA, detect(LLAMA)
    )
    assert len(found.selected(LLAMA, detect(LLAMA))) == 3
    assert resolved(targets.LayersConfig(exclude_modules=["q_proj"])).exclude_modules == ["q_proj"]


def test_the_layout_of_weights_is_said_where_peft_asks_for_it() -> None:
    assert resolved(targets.LayersConfig(), GPT2).fan_in_fan_out and not resolved(Lacking(), GPT2).fan_in_fan_out


def test_an_expression_with_layers_becomes_names() -> None:
    found = resolved(targets.LayersConfig(target_modules=r".*\.[qk]_proj", layers_to_transform=1))
    assert isinstance(found.target_modules, list) and len(found.target_modules) == 2
    assert {path.split(".")[2] for path in found.selected(LLAMA, detect(LLAMA))} == {"1"}


def test_only_numbers_inside_a_path_are_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))))
    found = targets.LayersConfig(target_modules=["0"], layers_to_transform=[1]).selected(model, detect(model))
    assert list(found) == ["1.1.0"]  # "1.0" is entry 0 of what is entry 1 of the model


@dataclass(frozen=True)
class OfEvenWidth(targets.LayersConfig):
    def misfit(self, path: str, module: nn.Module) -> str | None:
        return f"'{path}' has an odd width" if targets.sizes(module)[0] % 2 else None


@pytest.mark.parametrize("odd", [3, 33])
def test_misfits_are_left_out_or_refused_by_their_share_of_the_weight(odd: int) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, odd), nn.Linear(odd, 32))
    if odd == 3:
        with pytest.warns(UserWarning, match=r"leaves out 1 layers \('2'\), 7.9 % of the weight.*has an odd width"):
            assert list(OfEvenWidth().selected(model, detect(model))) == ["0", "1"]
    else:
        with pytest.raises(peftcore.PeftcoreError, match="'2' has an odd width"):
            OfEvenWidth().selected(model, detect(model))


def test_a_pattern_of_layers_without_layers_is_refused() -> None:
    with pytest.raises(
        peftcore.PeftcoreError, match=r"layers_pattern has no effect without layers_to_transform. Set layers"
    ):
        targets.LayersConfig(layers_pattern="layers")


def test_conv1d_is_distinguished_from_linear() -> None:
    assert targets.conv1d_paths(GPT2, ["lm_head", "transformer.h.0.attn.c_attn"]) == ["transformer.h.0.attn.c_attn"]
