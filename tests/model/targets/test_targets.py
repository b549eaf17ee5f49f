"""Which modules a config means: PEFT's matching, and an error where a pattern means nothing."""

import re

import pytest
from hypothesis import given, strategies as st
from support import tiny
from torch import nn

import peftcore
from peftcore.model import detect, targets

LLAMA = tiny.llama()
LINEARS = [path for path, module in LLAMA.named_modules() if isinstance(module, nn.Linear) and path != "lm_head"]


def select(model: nn.Module = LLAMA, **fields) -> list[str]:
    return list(targets.select(model, detect(model), **fields))


def test_all_linear_leaves_the_heads_out() -> None:
    assert select(target_modules="all-linear") == LINEARS
    bert = tiny.bert_classifier()
    chosen = select(bert, target_modules="all-linear")
    assert "bert.pooler.dense" in chosen and "classifier" not in chosen
    gpt2 = tiny.gpt2()
    assert select(gpt2, target_modules="all-linear") == [
        f"transformer.h.{i}.{name}"
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


def test_suffixes_match_whole_parts() -> None:
    assert select(target_modules=["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert select(target_modules=["layers.1.self_attn.q_proj"]) == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(peftcore.PeftcoreError, match=r"'proj' matches no module"):
        select(target_modules=["proj"])


def test_a_string_is_a_regular_expression_for_the_whole_path() -> None:
    assert select(target_modules=r".*layers\.0\..*proj") == [p for p in LINEARS if ".0." in p]
    assert select(target_modules=r".*mlp.*") == [p for p in LINEARS if "mlp" in p]  # containers are no targets


def test_exclusions_and_layers() -> None:
    both = {"target_modules": r".*(q_proj|embed_tokens)", "exclude_modules": ["embed_tokens"]}
    assert select(**both) == [p for p in LINEARS if p.endswith("q_proj")]
    assert select(target_modules="all-linear", exclude_modules=["q_proj", "mlp.up_proj"]) == [
        p for p in LINEARS if not p.endswith(("q_proj", "up_proj"))
    ]
    assert select(target_modules="all-linear", exclude_modules=r".*\.1\..*") == [p for p in LINEARS if ".0." in p]
    assert select(target_modules=["q_proj"], layers_to_transform=[1]) == ["model.layers.1.self_attn.q_proj"]
    assert select(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers") == [
        "model.layers.0.self_attn.q_proj"
    ]
    assert not any("mlp" in path for path in select(target_modules="all-linear", modules_to_save=["mlp"]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proy"]}, r"'q_proy' matches no module \(nearest: 'q_proj'"),
        ({"target_modules": ["q_proj", "nothing"]}, r"'nothing' matches no module"),
        ({"target_modules": []}, r"target_modules is empty"),
        (
            {"target_modules": ["mlp"]},
            r"'mlp' matches LlamaMLP \(such as 'model.layers.0.mlp'\), which this method cannot",
        ),
        (
            {"target_modules": "q_proj"},
            r"a regular expression for full paths, matches no module.*Examples of paths",
        ),
        ({"target_modules": ".*mlp"}, r"matches only LlamaMLP, which this method cannot adapt"),
        (
            {"target_modules": r".*(q_proj|embed_tokens)"},
            r"also matches Embedding \(such as 'model.embed_tokens'\), which this method cannot adapt. Add them to ex",
        ),
        ({"target_modules": "(["}, r"'\(\[' cannot be used as a regular expression"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["k_pro"]}, r"exclude_modules: 'k_pro' matches no module"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"selects no module after exclude_modules"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": []},
            r"layers_to_transform=\[\] does not select any layer",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0, 7]},
            r"is in layer \[7\] \(layers found: \[0, 1\]\)",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "h"},
            r"none by layers_pattern='h'",
        ),
    ],
)
def test_patterns_that_mean_nothing(fields: dict, message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        select(**fields)


def test_a_projection_that_is_never_called_is_refused() -> None:
    model = nn.Module()
    model.attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(peftcore.PeftcoreError, match=r"without calling it.*exclude_modules=\['out_proj'\]"):
        peftcore.apply(model, "vera", target_modules="all-linear")


def test_adapters_are_no_targets() -> None:
    with tiny.installed(tiny.method("around")):
        model = peftcore.apply(tiny.llama(), "around")
        assert select(model, target_modules="all-linear") == LINEARS


@given(st.sets(st.sampled_from(LINEARS), min_size=1))
def test_minimal_suffixes_select_the_same_modules(chosen: set[str]) -> None:
    suffixes = targets.minimal_suffixes(LLAMA, chosen)
    assert set(select(target_modules=suffixes)) == chosen
    for dropped in suffixes:
        rest = [s for s in suffixes if s != dropped]
        assert not rest or set(select(target_modules=rest)) < chosen


def test_minimal_suffixes_tell_a_head_apart() -> None:
    """RoBERTa's classifier has a `dense` too, which `all-linear` leaves out."""
    model = tiny.roberta_classifier()
    chosen = select(model, target_modules="all-linear")
    suffixes = targets.minimal_suffixes(model, chosen)
    assert "dense" not in suffixes
    assert select(model, target_modules=suffixes) == chosen


@given(
    st.sampled_from(LINEARS), st.sampled_from(["q_proj", "mlp.up_proj", "layers.1.mlp.up_proj", r"layers\.\d.*up_proj"])
)
def test_pattern_values_match_as_in_peft(path: str, key: str) -> None:
    wanted = 5 if re.match(rf"(.*\.)?({key})$", path) else 8
    assert targets.pattern_value({key: 5}, path, 8) == wanted


def test_trained_modules() -> None:
    bert = tiny.bert_classifier()
    assert targets.trained_modules(bert, ["classifier"]).names == ("classifier.weight", "classifier.bias")
    with pytest.raises(peftcore.PeftcoreError, match=r"'clasifier' matches no module.*'classifier'"):
        targets.trained_modules(bert, ["clasifier"])
    with pytest.raises(peftcore.PeftcoreError, match=r"'dropout' matches no module with parameters"):
        targets.trained_modules(bert, ["dropout"])


def test_match_counts() -> None:
    assert targets.match_counts(LLAMA, ["q_proj", "lm_head", "none"]) == {"q_proj": 2, "lm_head": 1, "none": 0}
    assert targets.match_counts(LLAMA, r".*self_attn\.[qk]_proj") == {r".*self_attn\.[qk]_proj": 4}
