"""An object of PEFT's in place of a method's config: it means what it means in the file that PEFT writes."""

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import fresh_process, tiny
from support.mixtures import INPUTS, mixture

import peftcore
from peftcore.engine import adapter_parameters, applied
from peftcore.plugin import StateRules

OBJECTS = {
    "what PEFT does by default": peft.LoraConfig(),
    "lora": peft.LoraConfig(
        r=4, lora_alpha=3, target_modules={"o_proj", "k_proj"}, use_rslora=True, lora_dropout=0.1, bias="lora_only",
        rank_pattern={"k_proj": 2}, layers_to_transform=[1], task_type="CAUSAL_LM",
    ),
    "a regular expression": peft.LoraConfig(target_modules=r".*\.mlp\.(up|down)_proj", exclude_modules=["up_proj"]),
    "lists without an entry": peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[], exclude_modules=[]),
    "all-linear": peft.LoraConfig(target_modules="all-linear", modules_to_save=["norm"]),
    "the token embedding by default": peft.TrainableTokensConfig(token_indices=[1, 5]),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "cpt": peft.CPTConfig(task_type="CAUSAL_LM"),
    "cpt with examples": peft.CPTConfig(
        cpt_token_ids=[5, 6, 7, 8], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4], opt_loss_decay_factor=0.5,
        opt_weighted_loss_type="decay", task_type="CAUSAL_LM",
    ),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTS)
def test_it_means_what_it_means_in_a_file(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny.llama(), copy.deepcopy(OBJECTS[name]))
        theirs.save_pretrained(tmp_path)
    wanted = peftcore.load(tiny.llama(), tmp_path, trainable=True)
    found = peftcore.apply(tiny.llama(), OBJECTS[name])
    shapes = [[(n, p.shape) for n, p in adapter_parameters(model, "default")] for model in (found, wanted)]
    assert shapes[0] == shapes[1]
    assert trained(found) == trained(wanted)
    configs = [dataclasses.asdict(applied(model, "default").config) for model in (found, wanted)]
    for config in configs:
        for field in (
            "modules_to_save",
            "initialize",
            "target_modules",
        ):  # values of a file
            config.pop(field, None)
    assert configs[0] == configs[1]
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert peftcore.plan(tiny.llama(), OBJECTS[name]).trainable_parameters == count


EXPERTS = ["q_proj", "gate_proj", "up_proj", "down_proj"]  # the layers of transformers 4


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("mixtral", {"target_modules": "all-linear"}),
        ("qwen3_moe", {"target_modules": "all-linear"}),
        ("qwen3_moe", {"target_modules": EXPERTS, "lora_alpha": 4}),
        ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
        ("deepseek_v3", {"target_modules": EXPERTS[1:]}),
        ("gpt_oss", {"target_modules": "all-linear"}),  # which is not in PEFT's table
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_experts_are_those_that_peft_finds(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, **fields)
    theirs = peft.get_peft_model(mixture(kind), copy.deepcopy(config)).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    wanted, found = peftcore.load(mixture(kind), tmp_path, trainable=True), peftcore.apply(mixture(kind), config)
    for (name, one), (other, value) in zip(
        adapter_parameters(found, "default"), adapter_parameters(wanted, "default"), strict=True
    ):
        assert name == other
        one.data.copy_(value)
    with torch.no_grad():
        logits = theirs(**INPUTS).logits
        assert (logits - mixture(kind)(**INPUTS).logits).abs().max() > 0.1
        torch.testing.assert_close(found(**INPUTS).logits, logits, rtol=1e-5, atol=1e-5)
    reached = peftcore.plan(mixture(kind), config).experts
    assert reached is not None and (reached.adapted == 0) == (kind == "gpt_oss")


def test_half_of_what_is_one_parameter_is_refused_as_by_peft() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="without also targeting up_proj because they are fused"):
        peftcore.plan(mixture("qwen3_moe"), peft.LoraConfig(target_modules=["gate_proj"]))


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_modules_to_save_are_those_that_peft_finds(tmp_path: Path) -> None:
    """For PEFT `norm` means whatever ends so."""
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny.llama(), copy.deepcopy(config))
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                torch.nn.init.normal_(parameter)
        theirs.save_pretrained(tmp_path)
    loaded, applied_here = peftcore.load(tiny.llama(), tmp_path, trainable=True), peftcore.apply(tiny.llama(), config)
    for model in (loaded, applied_here):
        assert sorted(n for n in trained(model) if "norm" in n) == sorted(
            f"model.{path}norm.weight"
            for path in ("", *(f"layers.{i}.{kind}_layer" for i in (0, 1) for kind in ("input", "post_attention")))
        )
    assert torch.allclose(tiny.logits(loaded), tiny.logits(theirs), atol=1e-5)


@pytest.mark.parametrize("saved", [None, ["embed_tokens"]])
def test_heads_of_a_task_are_trained_as_peft_does(saved: list[str] | None) -> None:
    from transformers import LlamaForSequenceClassification

    base = LlamaForSequenceClassification(tiny.llama().config)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=saved, task_type="SEQ_CLS")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    wanted = {
        n.split(".modules_to_save")[0].removeprefix("base_model.model.") for n in trained(theirs) if "lora" not in n
    }
    ours = peftcore.apply(base, config)
    assert {n.removesuffix(".weight") for n in trained(ours) if n in dict(base.named_parameters())} >= wanted
    assert "score" in wanted and "score.weight" in trained(ours)


def test_an_object_that_no_installed_method_reads_is_refused() -> None:
    for config in (peft.ShadowConfig(), peft.ShadowConfig(target_modules=["layers.0", "layers.1"])):
        with pytest.raises(peftcore.PluginError, match="no installed method reads peft_type 'SHADOW'"):
            peftcore.apply(tiny.llama(), config)


def test_the_object_is_left_as_it_was() -> None:
    config = peft.LoraConfig()
    peftcore.apply(tiny.llama(), config)
    assert config.target_modules is None


def test_first_values_are_those_that_it_asks_for() -> None:
    """Read from a file it would ask for none."""
    config = peft.PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB", task_type="CAUSAL_LM")
    model = peftcore.apply(tiny.llama(), config)
    ((_, prompt),) = adapter_parameters(model, "default")
    embedding = model.get_input_embeddings().weight
    assert all(any(torch.equal(row, other) for other in embedding) for row in prompt)


class Refuses:
    """A layer that PEFT would be told of by code."""


def with_code() -> Any:
    config = peft.LoraConfig()
    config._register_custom_module({torch.nn.Linear: Refuses})
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoraConfig(megatron_config={"a": 1}), "peft.LoraConfig .*megatron_config"),
        (with_code(), "peft.LoraConfig uses _custom_modules=.* 'lora' does not support"),
        (peft.LoraConfig(runtime_config=peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)), "uses runtime_config="),
        (peft.LoraConfig(target_modules=["k_porj"]), "'k_porj' matches no module"),
        (peft.LoraConfig(r=0.5), "peft.LoraConfig is not a valid config of 'lora': r must be"),
        (peft.OSFConfig(), "no installed method reads peft_type 'OSF'"),
        (peft.PeftConfig(), "peft.PeftConfig has no peft_type"),
    ],
)  # fmt: skip
def test_what_a_file_may_not_say_it_may_not_say(config: Any, message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.apply(tiny.llama(), config)


def test_modules_that_peft_has_no_table_for_are_asked_for() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(peftcore.PeftcoreError, match=r"peft.LoraConfig has no target_modules, .* for Sequential"):
        peftcore.apply(model, peft.LoraConfig())
    peftcore.apply(model, peft.LoraConfig(target_modules=["0"]))


def test_fields_beside_it_are_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="apply got a config object and also the fields r"):
        peftcore.apply(tiny.llama(), peft.LoraConfig(), r=3)


def test_two_methods_that_may_read_it_are_named() -> None:
    state = StateRules(peft_type="LORA")
    with (
        tiny.installed(tiny.method("another", state=state)),
        pytest.raises(peftcore.PluginError, match=r"'another' .*, 'lora' .*Choose one with peftcore.apply\(.*'NAME'"),
    ):
        peftcore.apply(tiny.llama(), peft.LoraConfig())


def test_peft_is_not_imported_for_the_question() -> None:
    code = (
        "import sys, torch, peftcore\n"
        "try: peftcore.apply(torch.nn.Linear(2, 2), object())\n"
        "except peftcore.PluginError as error: print(error, 'peft' in sys.modules)"
    )
    found = fresh_process.run(code)
    assert "object is not the config of an installed method" in found.stdout and found.stdout.endswith("False\n")
