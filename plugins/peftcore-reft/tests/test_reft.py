"""The formula, the tokens that are edited, and the files of AdapterHub's `adapters` 1.3.0 (adapterhub/make.py)."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peftcore_reft import Unit
from safetensors.torch import load_file
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_modules, applied
from peftcore.plugin import cache_argument, disturb

FOLDERS = Path(__file__).parent / "adapterhub"
spec = importlib.util.spec_from_file_location("reft_make", FOLDERS / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
models = make.models


def with_subtract_projection(name: str, folder: Path, subtracts: bool) -> Path:
    """A copy of a fixture whose config says what the library leaves out."""
    shutil.copytree(FOLDERS / name, folder)
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields["config"]["subtract_projection"] = subtracts
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("name", ["bert-loreft", "llama-loreft", "llama-loreft_tied", "llama-noreft", "bert-direft"])
def test_files_of_adapters(name: str, tmp_path: Path) -> None:
    expected = load_file(FOLDERS / name / "output.safetensors")
    folder = FOLDERS / name if "loreft" in name else with_subtract_projection(name, tmp_path / "said", "noreft" in name)
    model = models.filled(getattr(models, name.split("-")[0])())
    inputs = models.inputs(model)
    with torch.no_grad():
        base = model(**inputs)[0]
        peftcore.load(model, folder)
        plain, padded = model(**inputs)[0], model(**inputs, attention_mask=make.MASK)[0]
        assert (base - plain).abs().max() > 0.1
        torch.testing.assert_close(plain, expected["output"], rtol=1e-4, atol=1e-5)
        rows = make.MASK.bool()
        torch.testing.assert_close(padded[rows], expected["padded"][rows], rtol=1e-4, atol=1e-5)
        peftcore.save(model, tmp_path / "ours")
        twin = peftcore.load(models.filled(getattr(models, name.split("-")[0])()), tmp_path / "ours")
        assert torch.equal(twin(**inputs)[0], plain)
    if name == "llama-loreft":
        assert applied(model, "default").paths == ("model", "model.layers.1")


@pytest.mark.parametrize("name", ["llama-noreft", "bert-direft"])
def test_a_file_that_may_be_either_is_refused(name: str) -> None:
    model = models.filled(getattr(models, name.split("-")[0])())
    with pytest.raises(
        peftcore.CheckpointError, match=r"the file is a NoReFT or a DiReFT.*Add \"subtract_projection\""
    ):
        peftcore.load(model, FOLDERS / name)


def edit(unit: Unit, h: Tensor, subtracts: bool, orthogonal: bool) -> Tensor:
    """By the formula, in float64."""
    w, b, raw = (
        p.detach().double() for p in (unit.learned_source.weight, unit.learned_source.bias, unit.projection.weight)
    )
    r = raw
    if orthogonal:  # Gram and Schmidt
        rows: list[Tensor] = []
        for row in raw:
            remainder = row - sum((row @ earlier_row) * earlier_row for earlier_row in rows)
            rows.append(remainder / remainder.norm())
        r = torch.stack(rows)
    h = h.double()
    return h + (h @ w.T + b - (h @ r.T if subtracts else 0)) @ r


@pytest.mark.parametrize(("orthogonal", "subtracts"), [(True, True), (False, True), (False, False)])
def test_equals_the_formula_at_the_chosen_tokens(orthogonal: bool, subtracts: bool) -> None:
    """Two first tokens and one last, of rows with padding on the right and on the left, and of a short one."""
    model: Any = tiny.llama()
    fields = {"orthogonality": orthogonal, "subtract_projection": subtracts, "layers_to_transform": 0}
    outputs: dict[str, Tensor] = {}
    layer = model.model.layers[0]
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]])
    tokens = torch.cat([tiny.TOKENS, tiny.TOKENS[:1]])
    handle = layer.register_forward_hook(lambda module, args, out: outputs.update(out=out))
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=mask)
        plain = outputs["out"]
        handle.remove()
        peftcore.apply(model, "reft", r=3, prefix_positions=2, suffix_positions=1, dropout=0.0, **fields)
        layer.register_forward_hook(lambda module, args, out: outputs.update(out=out))
        model(input_ids=tokens, attention_mask=mask)
        assert torch.equal(outputs["out"], plain)
        disturb(model, "default", seed=1, std=0.3)
        model(input_ids=tokens, attention_mask=mask)
        first, last = dict(adapter_modules(model, "default"))["model.layers.0"].units.values()
        expected = plain.double()
        for row, columns in ((0, (0, 1)), (1, (2, 3)), (2, (5,))):
            for column in columns:
                expected[row, column] = edit(first, plain[row, column], subtracts, orthogonal)
        for row, column in ((0, 4), (1, 6), (2, 6)):
            expected[row, column] = edit(last, plain[row, column], subtracts, orthogonal)
        torch.testing.assert_close(outputs["out"].double(), expected, rtol=1e-4, atol=1e-5)


def test_the_last_tokens_of_a_prompt_stay_so_while_the_text_goes_on() -> None:
    model: Any = tiny.llama()
    peftcore.apply(model, "reft", r=2, prefix_positions=1, suffix_positions=2)
    disturb(model, "default", seed=1, std=0.5)
    lengths = torch.tensor([4, 3])
    prompt, mask = tiny.TOKENS[:, :4], torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    whole_mask = torch.cat([mask, torch.ones(2, 3, dtype=mask.dtype)], 1)
    with torch.no_grad():
        whole = model(input_ids=tiny.TOKENS, attention_mask=whole_mask, prompt_lengths=lengths).logits
        for options in ({"prompt_lengths": lengths}, {}):
            begun = model(input_ids=prompt, attention_mask=mask, use_cache=True, **options)
            positions = whole_mask.cumsum(1)[:, 4:] - 1
            continuation = model(
                input_ids=tiny.TOKENS[:, 4:],
                attention_mask=whole_mask,
                position_ids=positions,
                **{cache_argument(model): begun.past_key_values},
                **options,
            ).logits
            assert continuation.shape == (2, 3, 96)
            if options:
                previous = continuation
            else:
                torch.testing.assert_close(continuation, previous)
        steps = {}
        for cached in (True, False):
            steps[cached] = model.generate(
                prompt,
                attention_mask=mask,
                prompt_lengths=lengths,
                max_new_tokens=5,
                do_sample=False,
                use_cache=cached,
                output_logits=True,
                return_dict_in_generate=True,
            )
        for step, uncached_step in zip(steps[True].logits, steps[False].logits, strict=True):
            torch.testing.assert_close(step, uncached_step, rtol=1e-4, atol=1e-4)
    assert whole.shape == (2, 7, 96)


def test_both_stacks_of_an_encoder_decoder_count_their_own_tokens() -> None:
    model: Any = tiny.t5()
    peftcore.apply(model, "reft", r=2, prefix_positions=2, suffix_positions=1)
    assert applied(model, "default").paths == (
        "encoder",
        "decoder",
        "encoder.block.0.layer.1",
        "encoder.block.1.layer.1",
        "decoder.block.0.layer.2",
        "decoder.block.1.layer.2",
    )
    disturb(model, "default", seed=1, std=0.5)
    ids, mask = tiny.TOKENS, torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    written, its_mask = tiny.TOKENS[:, :4], torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        call = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": written}
        both = model(**call, decoder_attention_mask=its_mask).logits
        first = model(input_ids=ids[:1, :5], decoder_input_ids=written[:1]).logits
        second = model(input_ids=ids[1:], decoder_input_ids=written[1:, :2]).logits
    torch.testing.assert_close(both[:1], first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1:, :2], second, rtol=1e-4, atol=1e-4)


def test_masks_that_it_cannot_count_by() -> None:
    model: Any = peftcore.apply(tiny.llama(), "reft")
    with pytest.raises(
        peftcore.PeftcoreError,
        match=r"ReFT counts the tokens .* the attention mask must be .* found \[2, 1, 7, 7\]",
    ):
        model(input_ids=tiny.TOKENS, attention_mask=torch.zeros(2, 1, 7, 7))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 33}, r"r=33 is more than the width of 'model.layers.0', 32"),
        ({"prefix_positions": 0}, r"prefix_positions and suffix_positions are \(0, 0\), which selects no tokens"),
        ({"prefix_positions": -1}, "selects no tokens"),
        ({"non_linearity": "rellu"}, "non_linearity must be 'relu'"),
        ({"exclude_modules": ["mlp"]}, "need target_modules"),
        ({"layers_to_transform": 7}, r"the model has no layers \[7\]"),
    ],
)
def test_wrong_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.apply(tiny.llama(), "reft", **fields)


def test_modules_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    peftcore.apply(model, "reft", target_modules=["0"], prefix_positions=1, dropout=0.0)
    disturb(model, "default", seed=1)
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        plain = nn.functional.linear(x, model[0].weight, model[0].bias)
        unit = dict(adapter_modules(model, "default"))["0"].units["first"]
        plain[:, 0] = edit(unit, plain[:, 0], True, True).float()
        expected = nn.functional.linear(plain, model[1].weight, model[1].bias)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("is_pre_norm", "paths"),
    [
        (True, ("model.decoder.layers.0", "model.decoder.layers.1")),
        (False, ("model.decoder.layers.0.final_layer_norm", "model.decoder.layers.1.final_layer_norm")),
    ],
)
def test_opt_whose_feed_forward_has_rows(is_pre_norm: bool, paths: tuple[str, ...]) -> None:
    """What a layer gives has the batch's shape again, behind the residual: a view, which hid what gives it."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        do_layer_norm_before=is_pre_norm,
    )  # fmt: skip
    model, tokens = transformers.OPTForCausalLM(config).eval(), torch.arange(6)[None]
    with torch.no_grad():
        base = model(tokens).logits
        peftcore.apply(model, "reft")
        assert applied(model, "default").paths == ("model.decoder", *paths)
        disturb(model, "default", 3)
        assert (model(tokens).logits - base).abs().max() > 1e-3


def test_a_length_of_the_prompt_for_each_row() -> None:
    model: Any = peftcore.apply(tiny.llama(), "reft", r=2, suffix_positions=2)
    for count in (3, 4):
        match = f"prompt_lengths has {count} lengths, and the batch has 1 rows"
        with torch.no_grad(), pytest.raises(peftcore.PeftcoreError, match=match):
            model(tiny.TOKENS[:1], prompt_lengths=torch.full((count,), 4))
