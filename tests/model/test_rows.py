"""Which rows belong to which sample is observed: right, or refused, with as many samples as tokens and images too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from census import instances
from census.images import with_images
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.model.rows import UNKNOWN, rows_of, slice_samples
from peftcore.testing import disturb

NAMES = ["a", None, "b"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def with_two(model: nn.Module, method: str = "lora", **fields: Any) -> Any:
    for seed, name in enumerate("ab"):
        peftcore.apply(model.eval(), method, adapter=name, **fields)
        disturb(model, name, seed=seed, std=0.5)
    return model


def tokens(samples: int = 3, length: int = 3) -> Tensor:
    return torch.randint(3, 90, (samples, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def check_rows(model: Any, inputs: dict[str, Any], dim: int = 0, names: Any = NAMES) -> None:
    """Each sample of a mixed batch must be what it is when the whole batch has its adapter."""
    wanted = {}
    for name in names:
        peftcore.activate(model, name or [])
        wanted[name] = _first(model(**inputs))
    peftcore.activate(model, names, per_sample=True)
    found = _first(model(**inputs))
    assert not torch.allclose(wanted["a"], wanted["b"], atol=1e-2)
    for sample, name in enumerate(names):
        torch.testing.assert_close(found.select(dim, sample), wanted[name].select(dim, sample), rtol=1e-4, atol=1e-4)


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def encoder(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["self_attn"]])
def test_an_encoder_with_as_many_tokens_as_samples(batch_first: bool, targets: list[str]) -> None:
    model = with_two(encoder(batch_first=batch_first), target_modules=targets)
    check_rows(model, {"src": torch.randn(3, 3, 16)}, dim=0 if batch_first else 1)


def test_a_model_that_turns_its_samples_to_dimension_1() -> None:
    config = hf.XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=48)
    check_rows(with_two(hf.XLNetModel(config), target_modules=["layer_1", "layer_2"]), {"input_ids": tokens()})


def test_a_bias_of_positions_is_nobodys() -> None:
    model = with_two(tiny.t5(), target_modules=["relative_attention_bias"])
    peftcore.activate(model, NAMES, per_sample=True)
    with pytest.raises(
        peftcore.PeftcoreError, match=r"Embedding cannot be split into samples: at '.*', its inputs are"
    ):
        model(input_ids=tokens(), decoder_input_ids=tokens())


def llava() -> Any:
    torch.manual_seed(0)
    vision = {**SIZES, "image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}
    text = {**SIZES, "model_type": "llama", "vocab_size": 96}
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=90)
    )


def of_images(*images: int) -> dict[str, Tensor]:
    """Text of samples with so many images each, of four patches."""
    ids = tokens(len(images), 10)
    for row, count in enumerate(images):
        ids[row, : 4 * count] = 90
    return {"input_ids": ids, "pixel_values": torch.randn(sum(images), 3, 16, 16)}


@pytest.mark.parametrize("images", [(2, 0), (1, 1)])
def test_images_are_not_samples(images: tuple[int, int]) -> None:
    inputs = of_images(*images)
    text = with_two(llava(), target_modules=r"model\.language_model\..*(q|v|down)_proj")
    check_rows(text, inputs, names=["a", "b"])
    model = with_two(llava(), target_modules=["q_proj"])
    peftcore.activate(model, ["a", "b"], per_sample=True)
    with pytest.raises(
        peftcore.PeftcoreError, match=r"split into samples: at '.*', a forward on example .* not call the module"
    ):
        model(**inputs)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=tokens(2, 2)).logits).all()  # without images the tower is not called


def test_an_expert_gets_a_choice_of_tokens() -> None:
    config = hf.SwitchTransformersConfig(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        num_experts=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    )
    torch.manual_seed(0)
    model = hf.SwitchTransformersForConditionalGeneration(config)
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(3, 4)}
    experts = [rows for path, rows in rows_of(model).items() if "experts.expert_" in path and path.endswith(".wi")]
    assert "its input has rows of all samples in an unknown order" in experts
    assert all(isinstance(rows, str) for rows in experts)
    check_rows(with_two(model, target_modules=["q", "v"]), inputs)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # transformers before 5.24
def test_one_projection_of_tokens_and_of_distances() -> None:
    config = hf.DebertaV2Config(
        vocab_size=96, **SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True,
        position_buckets=4, max_position_embeddings=32, norm_rel_ebd="layer_norm", position_biased_input=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.DebertaV2Model(config)
    check_rows(with_two(model, target_modules=["value_proj", "dense"]), {"input_ids": tokens()})
    for name in "ab":
        peftcore.remove(model, name)
    with_two(model, target_modules=["query_proj"])
    peftcore.activate(model, NAMES, per_sample=True)
    with pytest.raises(peftcore.PeftcoreError, match="samples are in different dimensions in its calls"):
        model(input_ids=tokens())


def test_a_padded_batch_of_adapters_around_attention() -> None:
    """Its arguments are split as each was observed: masks, and positions that samples share or have of their own."""
    model = with_two(tiny.llama(), "adaption-prompt", adapter_len=3, adapter_layers=1)
    mask = torch.ones(3, 4, dtype=torch.long)
    mask[1, :2] = 0
    for extra in (
        {},
        {"attention_mask": mask},
        {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(0)},
    ):
        check_rows(model, {"input_ids": tokens(3, 4), "use_cache": False, **extra})


def test_changes_of_weights_act_by_sample(toys: None) -> None:
    names = ("model.layers.0.self_attn.q_proj:weight", "model.layers.1.mlp:down_proj.weight")
    check_rows(with_two(tiny.llama(), "on-weight", names=names), {"input_ids": tokens()})


class Turned(nn.Module):
    """Heads of `[tokens, samples, width]`, as fairseq's models split them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(90, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        y = self.layer(self.embed(input_ids).transpose(0, 1).contiguous())
        return y.view(len(y), -1, 4).transpose(0, 1)


class Flat(nn.Module):
    """A layer that gets the tokens of all samples as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(90, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        y = self.layer(self.embed(input_ids).flatten(0, 1))
        return y.view(*input_ids.shape, -1)


def test_tokens_of_all_samples_as_rows() -> None:
    check_rows(with_two(Flat(), target_modules=["layer"]), {"input_ids": tokens(3, 4)})


def test_an_output_lies_in_memory_as_the_layers_own() -> None:
    model = with_two(Turned(), target_modules=["layer"])
    with torch.no_grad():
        peftcore.activate(model, "a")
        wanted = model(tokens())
        peftcore.activate(model, ["a"] * 3, per_sample=True)
        torch.testing.assert_close(model(tokens()), wanted)


def test_layers_behind_a_router_are_observed() -> None:
    config = hf.JetMoeConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=48,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    check_rows(with_two(hf.JetMoeForCausalLM(config), target_modules=["kv_proj"]), {"input_ids": tokens()})


def test_text_with_images_in_patches() -> None:
    """Qwen2-VL's positions are `[3, samples, tokens]`, and its tower gets the patches of all images."""
    model = instances.build("Qwen2VLForConditionalGeneration").eval()
    case = with_images(model)
    assert case is not None and len(case.inputs["input_ids"]) == 2
    targets = r"model\.language_model\..*(q|v|down)_proj"
    check_rows(with_two(model, target_modules=targets), case.inputs, names=["a", "b"])


def test_experts_and_their_encoder_and_decoder() -> None:
    model = instances.build("NllbMoeForConditionalGeneration").eval()
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(3, 4)}
    check_rows(with_two(model, target_modules=["q_proj", "v_proj"]), inputs)


class Unknown(nn.Module):
    """Its forward takes what no builder of examples knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, zebra: Tensor, stripes: int) -> Tensor:
        return self.layer(zebra)


def test_what_cannot_be_observed_is_refused() -> None:
    model = with_two(Unknown(), target_modules=["layer"])
    peftcore.activate(model, NAMES, per_sample=True)
    with pytest.raises(peftcore.PeftcoreError, match="a Linear cannot be split into samples: at 'layer', a forward on"):
        model(torch.randn(3, 4), 2)


def test_samples_of_an_argument_that_was_not_observed() -> None:
    shared, numbers = torch.randn(1, 2), torch.tensor([0, 2])
    assert slice_samples(shared, UNKNOWN, numbers, 3) is shared
    with pytest.raises(peftcore.PeftcoreError, match=r"the samples in an argument of shape \[3, 2\] are unknown"):
        slice_samples(torch.randn(3, 2), UNKNOWN, numbers, 3)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}, {}])
@pytest.mark.parametrize("kind", [tiny.llama, tiny.t5])
def test_generate_repeats_samples_for_beams(kind: Any, options: dict[str, int]) -> None:
    model = with_two(kind())
    options = {"max_new_tokens": 4, "do_sample": False, **options}
    returned = options.get("num_return_sequences", 1)
    wanted = []
    for name in NAMES:
        peftcore.activate(model, name or [])
        wanted.append(model.generate(tokens(), **options))
    peftcore.activate(model, NAMES, per_sample=True)
    found = model.generate(tokens(), **options)
    assert len(found) == 3 * returned
    assert not torch.equal(wanted[0], wanted[2])
    for sample, by_adapter in enumerate(wanted):
        own = slice(sample * returned, (sample + 1) * returned)
        width = min(found.shape[1], by_adapter.shape[1])
        assert torch.equal(found[own, :width], by_adapter[own, :width])


def test_generate_repeats_samples_inside_the_module_of_another_adapter() -> None:
    """Inside `a`, around attention, layers of `b` look up the samples of each beam again."""
    model = peftcore.apply(tiny.llama(), "adaption-prompt", adapter="a", adapter_len=3, adapter_layers=2)
    peftcore.apply(model, "lora", adapter="b")
    for seed, name in enumerate("ab"):
        disturb(model, name, seed=seed, std=0.5)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "use_cache": False}
    wanted = []
    for sample, name in zip(tokens(), NAMES, strict=True):
        peftcore.activate(model, name or [])
        wanted.append(model.generate(sample[None], **options)[0])
    peftcore.activate(model, NAMES, per_sample=True)
    for found, alone in zip(model.generate(tokens(), **options), wanted, strict=True):
        assert torch.equal(found[: len(alone)], alone)
