"""Files of PEFT's variants of LoRA that are plain LoRA once trained say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from support import tiny
from support.against_peft import moved, quiet

import peftcore


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"velora_config": peft.VeloraConfig(num_groups=4)}, "velora_config: loaded as plain LoRA.*exact"),
        ({"monteclora_config": peft.MontecloraConfig()}, "monteclora_config: .* training does not sample A"),
    ],
)
def test_training_that_goes_another_way_is_reported(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "o_proj"], **fields)
    quiet(moved(quiet(peft.get_peft_model, tiny.llama(), config)).save_pretrained, tmp_path)
    with pytest.warns(UserWarning, match=message):
        peftcore.load(tiny.llama(), tmp_path)


@pytest.mark.parametrize(
    ("fields", "way_round"),
    [
        (
            {"use_dora": True},
            r"no field 'use_dora'.*method 'dora': peftcore.apply\(model, 'dora', ...\)\. Its",
        ),
        ({"use_qalora": True}, "no field 'use_qalora'.* Train on an NF4 base: method qlora. Its fields are: r,"),
        ({"use_dorra": True}, r"no field 'use_dorra' \(nearest: 'use_bdlora', 'use_rslora'\)\. Its fields are: r,"),
    ],
    ids=["dora", "qalora", "misspelt"],
)
def test_a_field_of_peft_s_that_is_not_lora_s_is_refused_with_the_way_round(
    fields: dict[str, Any], way_round: str
) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=way_round):
        peftcore.apply(tiny.llama(), "lora", **fields)
