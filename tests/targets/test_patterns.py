"""Patterns give what `re.fullmatch` gives, in bounded time."""

import re
import time

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import peftcore
from peftcore.targets import patterns

PATHS = [
    "",
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "model.vision_tower.encoder.layers.3.self_attn.v_proj",
    "transformer.h.2.attn.c_attn",
    "A.B_1",
]
# As users of PEFT write them.
USUAL = [
    r".*\.(q_proj|v_proj)",
    r"^(?!.*vision_tower).*(?:q_proj|v_proj|down_proj)$",
    r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    r".*(?<!vision_tower\.encoder)\.layers\.[0-9]{1,2}\..*(?:attn|mlp).*",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp|attn)\.(?:(?:down_proj)))",
    r"(?i)MODEL\.(?-i:layers).*",
    r".*\b(q_proj|c_attn)\b",
    r"(?:[a-z_]+\.)*\d+(?:\.\w+)+",
    r"(?:a|A)\.(?:(?s:.))*?1$",
    r"[^.]*\.?[^0-9]*",
]
TRAPS = [r"([a-z_.0-9]+)+X", r".*.*.*.*.*.*.*.*.*X", r"(a|[ab]|\w|.)*X", r"((.*)*)*X", "(?:m|[lm])?" * 40 + "X"]


def bounded(pattern: str):
    """The pattern, followed on all ways at once whether it must be or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "_WAYS", -1)
        return patterns.full_match.__wrapped__(pattern)


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns(pattern: str) -> None:
    wanted = [re.fullmatch(pattern, path) is not None for path in PATHS]
    assert any(wanted)
    assert list(map(bounded(pattern), PATHS)) == wanted
    assert list(map(patterns.compiled(pattern, "target_modules"), PATHS)) == wanted


_PIECES = st.recursive(
    st.sampled_from(["a", "b", "ab", ".", "[^a]", r"\w", r"\.", "", "^", "$", r"\b", r"\B", "(?i:A)", r"\d"]),
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("(?:{}|{})".format, inner, inner),
        st.builds("(?:{}){}".format, inner, st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,3}", "{2,}"])),
        st.builds("({}{})".format, st.sampled_from(["?=", "?!", ""]), inner),
    ),
    max_leaves=6,
)


@given(_PIECES, st.text("ab.A1", max_size=7))
def test_any_pattern_gives_what_re_gives(pattern: str, text: str) -> None:
    assert bounded(pattern)(text) == (re.fullmatch(pattern, text) is not None)


@pytest.mark.parametrize("pattern", TRAPS)
def test_traps_take_no_time(pattern: str) -> None:
    began = time.process_time()
    assert not any(patterns.compiled(pattern, "target_modules")(path) for path in PATHS)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("pattern", TRAPS[:2])
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
def test_every_field_of_a_config_is_bounded(field: str, pattern: str) -> None:
    value = {pattern: 4} if field.endswith("k_pattern") or field == "alpha_pattern" else pattern
    others = {"layers_to_transform": [0], "target_modules": ["q_proj"]} if field == "layers_pattern" else {}
    model, _ = tiny.llama(), peftcore.methods()  # imports
    began = time.process_time()
    if "_pattern" in field and field != "layers_pattern":
        peftcore.apply(model, "lora", **{field: value})
        assert model.model.layers[0].self_attn.q_proj._modules["peftcore"] is not None
    else:
        with pytest.raises(peftcore.PeftcoreError, match=field):
            peftcore.apply(model, "lora", **{field: value, **others})
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"target_modules='\(' is no regular expression that can be used: missing \)"),
        ("(" * 5000 + ")" * 5000, "nested too deeply"),
        (r"(.*)(.*)(.*)(.*)\1", "GROUPREF cannot be matched in bounded time"),
        ("a" * 200_000, r"it has 200,000 characters"),
    ],
    ids=["syntax", "deep", "reference", "long"],
)
def test_what_cannot_be_used_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        patterns.compiled(pattern, "target_modules")
