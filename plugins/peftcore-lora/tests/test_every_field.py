"""docs/lora.md: whether files with each field of PEFT's `LoraConfig` load in peftcore, and load back in PEFT.

PEFTCORE_WRITE_FIELDS=1 writes the page; otherwise the test compares it with the outcomes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peftcore_lora import replicate_layers
from peftcore_lora.files import PLAIN_VARIANTS
from support import tiny
from support.against_peft import logits, moved, quiet
from torch import nn

import peftcore

PAGE = Path(__file__).parents[3] / "docs" / "lora.md"
# Fields that every config of PEFT has; `runtime_config` is not saved.
COMMON = {f.name for f in dataclasses.fields(peft.PeftConfig)} | {"peft_type", "inference_mode", "runtime_config"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A file that PEFT writes.

    Args:
        label: the field's value in the page.
        fields: arguments of PEFT's config.
        edits: fields written into the saved config afterwards.
        make: makes the base.
        prepare: prepares the base before peftcore loads the file.
    """

    label: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    edits: dict[str, Any] = dataclasses.field(default_factory=dict)
    make: Callable[[], nn.Module] = tiny.llama
    prepare: Callable[[nn.Module], Any] = lambda model: model


Q = {"target_modules": ["q_proj", "o_proj"]}
BLOCKS = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
TWICE = [[0, 2], [1, 2]]
CONFIGS = ("eva_config", "corda_config", "lora_ga_config", "loftq_config")


def cases(field: str, *values: Any, make: Callable[[], nn.Module] = tiny.llama, **fields: Any) -> list[Case]:
    return [Case(json.dumps(value), {**Q, **fields, field: value}, make=make) for value in values]


ROWS: dict[str, list[Case]] = {
    "r": cases("r", 3),
    "target_modules": cases("target_modules", ["q_proj"], r".*\.1\..*up_proj", "all-linear"),
    "exclude_modules": cases("exclude_modules", ["layers.0.self_attn.q_proj"], r".*\.1\..*"),
    "lora_alpha": cases("lora_alpha", 5),
    "lora_dropout": cases("lora_dropout", 0.1),
    "fan_in_fan_out": cases("fan_in_fan_out", True, make=tiny.gpt2, target_modules=["c_attn"]),
    "bias": cases("bias", "all", "lora_only", make=tiny.bert_classifier, target_modules=["query"]),
    "use_rslora": cases("use_rslora", True, r=3),
    "modules_to_save": cases("modules_to_save", ["lm_head"], ["input_layernorm"]),
    "init_lora_weights": [
        *cases(
            "init_lora_weights", True, False, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_2", "mica", r=2
        ),
        *(Case(json.dumps(start), Q, {"init_lora_weights": start}) for start in ("eva", "corda", "lora_ga", "loftq")),
    ],
    "layers_to_transform": cases("layers_to_transform", [1], 0),
    "layers_pattern": cases("layers_pattern", "layers", layers_to_transform=[1]),
    "rank_pattern": cases("rank_pattern", {"q_proj": 2, "layers.1.self_attn.o_proj": 5}),
    "alpha_pattern": cases("alpha_pattern", {"o_proj": 3}, {r"layers\.\d+\.self_attn.q_proj": 7}),
    "megatron_config": [Case("{...}", Q, {"megatron_config": {"hidden_size": 32}})],
    "megatron_core": [Case('"megatron.core"', Q, {"megatron_core": "megatron.core"})],
    "trainable_token_indices": [
        *cases("trainable_token_indices", [60, 3], {"embed_tokens": [3], "lm_head": [4]}),
        *cases("trainable_token_indices", [60, 3], make=tiny.gpt2, target_modules=["c_attn"]),
    ],
    "loftq_config": [Case("{...}", Q, {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}})],
    "eva_config": [Case("{...}", Q, {"eva_config": {"rho": 2.0}})],
    "corda_config": [Case("{...}", Q, {"corda_config": {"corda_method": "ipm"}})],
    "lora_ga_config": [Case("{...}", Q, {"lora_ga_config": {"direction": "ArB2r"}})],
    "use_dora": cases("use_dora", True),
    "velora_config": [Case("{...}", {**Q, "velora_config": peft.VeloraConfig(num_groups=4, init_type="random")})],
    "alora_invocation_tokens": cases("alora_invocation_tokens", [17, 3]),
    "use_qalora": [Case("true", Q, {"use_qalora": True})],
    "qalora_group_size": [Case("16", Q, {"qalora_group_size": 16})],
    "monteclora_config": [Case("{...}", {**Q, "monteclora_config": peft.MontecloraConfig()})],
    "layer_replication": [
        Case(str(TWICE), {**Q, "layer_replication": TWICE}, prepare=lambda model: replicate_layers(model, TWICE))
    ],
    "lora_bias": cases("lora_bias", True, make=tiny.bert_classifier, target_modules=["query"]),
    "target_parameters": cases("target_parameters", ["v_proj.weight"]),
    "use_bdlora": [Case("{...}", {**Q, "r": 4, "use_bdlora": peft.BdLoraConfig(**BLOCKS)})],
    "arrow_config": [Case("{...}", Q, {"arrow_config": {"top_k": 2}})],
    "kasa_config": [Case("{...}", Q, {"kasa_config": {"beta": 0.1}})],
    "ensure_weight_tying": [
        *cases("ensure_weight_tying", True, False, make=tiny.gpt2, target_modules=["c_attn"], modules_to_save=["wte"]),
        *cases("ensure_weight_tying", True, make=tiny.gpt2, target_modules=["c_attn", "wte", "lm_head"]),
    ],
}


NOTES = {
    **{name: f"loaded as plain LoRA, which is equivalent; {effect}" for name, effect in PLAIN_VARIANTS.items()},
    **dict.fromkeys(CONFIGS, "only for the initialisation by `init_lora_weights`; a trained file does not need it"),
    "layer_replication": "after `peftcore_lora.replicate_layers(model, ...)`, without which it is refused",
    "megatron_core": "no effect without `megatron_config`",
    "qalora_group_size": "no effect without `use_qalora`",
    "fan_in_fan_out": "peftcore reads the layout from the layer",
    "use_dora": "by the plugin `dora`",
    "alora_invocation_tokens": "by the plugin `alora`",
    "target_parameters": "parameters of any module, with two or three dimensions; also files of PEFT before 0.19",
    "trainable_token_indices": "by the plugin `trainable-tokens`; also modules tied to the embedding",
    "lora_bias": "merging changes the layer's bias, and is refused for layers without one",
    "ensure_weight_tying": "PEFT's default is False, here it is True",
}


def outcome(case: Case, folder: Path) -> str:
    """`works`, or the error that refuses the file."""
    base = case.make()
    task = peftcore.model.detect(base).task_type
    config = quiet(peft.LoraConfig, task_type=task, **{"r": 4, **case.fields})
    peft_model = moved(quiet(peft.get_peft_model, base, config).eval())
    quiet(peft_model.save_pretrained, folder / "peft")
    file = folder / "peft" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **case.edits}))
    try:
        model = quiet(peftcore.load, case.prepare(case.make()), folder / "peft")
    except peftcore.PeftcoreError as error:
        return re.sub(r"^'[^']*peft[^']*'[: ]*", "", str(error)).strip()
    torch.testing.assert_close(logits(model), logits(peft_model), rtol=0, atol=1e-5)
    peftcore.save(model, folder / "peftcore")
    reloaded = quiet(peft.PeftModel.from_pretrained, case.make(), folder / "peftcore").eval()
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=0, atol=1e-5)
    return "works"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, str]]]:
    """{field: [(value, outcome)]}."""
    return {
        field: [(case.label, outcome(case, tmp_path_factory.mktemp(field))) for case in field_cases]
        for field, field_cases in ROWS.items()
    }


def page(outcomes: dict[str, list[tuple[str, str]]]) -> str:
    lines = [
        "# LoRA: each field of PEFT's `LoraConfig`",
        "",
        "For each value PEFT writes a file, peftcore loads and saves it, and PEFT loads that. *Works* means that both",
        "times the logits agree to 1e-5 in float32; otherwise the table has the error that refuses the file.",
        "",
        "| field | value | outcome |",
        "|---|---|---|",
    ]
    for field, field_outcomes in outcomes.items():
        values_by_result: dict[str, list[str]] = {}
        for label, result in field_outcomes:
            values_by_result.setdefault(result, []).append(label.replace("|", "\\|"))
        for result, values in values_by_result.items():
            note = f" ({NOTES[field]})" if result == "works" and field in NOTES else ""
            lines.append(f"| `{field}` | {', '.join(f'`{value}`' for value in values)} | {result}{note} |")
    return "\n".join([*lines, "", f"Made by `{Path(__file__).name}` on PEFT {peft.__version__}."]) + "\n"


def test_every_field_has_a_row() -> None:
    fields = {f.name for f in dataclasses.fields(peft.LoraConfig)} - COMMON
    assert fields == ROWS.keys()


def test_page_is_up_to_date(outcomes: dict[str, list[tuple[str, str]]]) -> None:
    if os.environ.get("PEFTCORE_WRITE_FIELDS"):
        PAGE.write_text(page(outcomes))
    assert page(outcomes) == PAGE.read_text(), "docs/lora.md is stale: PEFTCORE_WRITE_FIELDS=1 updates it"


def test_supported_fields_work(outcomes: dict[str, list[tuple[str, str]]]) -> None:
    partly_refused = {
        "megatron_config", "use_qalora", "arrow_config", "kasa_config", "init_lora_weights",
        "use_dora",
    }  # fmt: skip
    for field in outcomes.keys() - partly_refused:
        assert {result for _, result in outcomes[field]} == {"works"}, field
