"""An adapter for each sample of a batch, of a mixture of experts: as if each sample were alone with its adapter."""

import pytest
import torch
from support.mixtures import mixture

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.testing import disturb

NAMES = ["a", None, "b", "a"]


def with_two(kind, **fields):
    model = mixture(kind)
    for seed, name in enumerate("ab"):
        peftcore.apply(model, "lora", adapter=name, r=4 + 4 * seed, **fields)
        disturb(model, name, seed=seed, std=0.2)
    return model


def tokens(samples=4, length=6):
    return torch.randint(3, 90, (samples, length), generator=torch.Generator().manual_seed(2))


def alone(model, batch, names=NAMES):
    """Logits of each sample with its adapter alone."""
    found = []
    for sample, name in zip(batch, names, strict=True):
        peftcore.activate(model, name or [])
        found.append(model(input_ids=sample[None]).logits)
    return torch.cat(found)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "qwen3_next"])
def test_each_sample_passes_through_its_own(kind):
    """Qwen3-Next gives its shared expert, too, all tokens in one dimension."""
    model = with_two(kind)
    with torch.no_grad():
        wanted = alone(model, tokens())
        peftcore.activate(model, NAMES, per_sample=True)
        found = model(input_ids=tokens()).logits
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert (found[0] - model(input_ids=tokens()[[3, 1, 2, 0]]).logits[3]).abs().max() < 1e-5
        with peftcore.disabled(model):
            torch.testing.assert_close(model(input_ids=tokens()).logits[1], wanted[1], rtol=1e-5, atol=1e-5)
        # A token of each, as generation asks.
        torch.testing.assert_close(
            model(input_ids=tokens(4, 1)).logits, alone(model, tokens(4, 1)), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("quantized", [False, True])
def test_gradients_are_those_of_each_alone(quantized):
    model = mixture("qwen3_moe")
    if quantized:
        peftcore.quantize(model)
    for seed, name in enumerate("ab"):
        peftcore.apply(model, "lora", adapter=name, r=4, target_modules=["experts"])
        disturb(model, name, seed=seed, std=0.2)

    def gradients(name, batch):
        parameters = [p for _, p in adapter_parameters(model, name)]
        return torch.autograd.grad(model(input_ids=batch).logits.square().sum(), parameters)

    peftcore.activate(model, NAMES, per_sample=True)
    found = {name: gradients(name, tokens()) for name in "ab"}
    for name, rows in (("a", [0, 3]), ("b", [2])):
        peftcore.activate(model, name)
        for one, other in zip(found[name], gradients(name, tokens()[rows]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_a_batch_of_others_is_refused_where_only_experts_are_adapted():
    """Whose tokens would divide by the number of samples, too."""
    model = with_two("qwen3_moe", target_modules=["experts"])
    peftcore.activate(model, NAMES, per_sample=True)
    for shape in ((2, 6), (1, 4), (2, 2), (8, 1)):
        with pytest.raises(peftcore.PeftcoreError, match=f"4 samples have adapters .* got a batch of {shape[0]}"):
            model(input_ids=tokens(*shape))


def test_generation_gives_each_sample_its_own():
    model = with_two("qwen3_moe")
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    peftcore.activate(model, NAMES, per_sample=True)
    found = model.generate(tokens(), **options)
    options["attention_mask"] = options["attention_mask"][:1]
    for i, name in enumerate(NAMES):
        peftcore.activate(model, name or [])
        assert torch.equal(model.generate(tokens()[[i]], **options)[0], found[i])


def test_experts_that_get_all_tokens_several_times_are_refused():
    """Llama 4 repeats the tokens for each expert before it calls them."""
    model = with_two("llama4_text", target_modules=["experts"])
    peftcore.activate(model, NAMES, per_sample=True)
    with pytest.raises(peftcore.PeftcoreError, match="its input has rows of all samples in an unknown order"):
        model(input_ids=tokens())
