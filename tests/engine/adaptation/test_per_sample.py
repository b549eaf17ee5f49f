"""An adapter for each sample of a batch: as if each sample were alone with its adapter."""

import copy
import pickle

import pytest
import torch
from support import tiny
from torch import nn

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.plugin import Around
from peftcore.testing import disturb

NAMES = ["a", None, "b", "a"]


@pytest.fixture(params=["lora", "adapter", "lora in 4 bits", "both"])
def model(request):
    torch.manual_seed(0)
    model = tiny.llama().eval()
    if request.param == "lora in 4 bits":
        peftcore.quantize(model)
    first, second = {"adapter": ("adapter", "adapter"), "both": ("lora", "adapter")}.get(
        request.param, ("lora", "lora")
    )
    peftcore.apply(model, first, adapter="a", **({"r": 4, "lora_alpha": 8} if first == "lora" else {}))
    peftcore.apply(model, second, adapter="b")
    for seed, name in enumerate("ab"):
        disturb(model, name, seed=seed, std=0.5)
    return model


def tokens():
    return torch.randint(3, 90, (4, 6), generator=torch.Generator().manual_seed(2))


def alone(model, batch):
    """Logits of each sample with its adapter alone."""
    found = []
    for sample, name in zip(batch, NAMES, strict=True):
        peftcore.activate(model, name or [])
        found.append(model(input_ids=sample[None]).logits)
    return torch.cat(found)


@pytest.mark.parametrize("grad", [False, True])
def test_each_sample_passes_through_its_own(model, grad):
    with torch.set_grad_enabled(grad):
        wanted = alone(model, tokens())
        assert (wanted[0] - wanted[3]).abs().max() > 0
        peftcore.activate(model, NAMES, per_sample=True)
        found = model(input_ids=tokens()).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(input_ids=tokens()).logits, found, rtol=1e-3, atol=1e-4)
    with peftcore.disabled(model):
        base = model(input_ids=tokens()).logits
    torch.testing.assert_close(found[1], base[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model(input_ids=tokens()).logits, found)
    peftcore.activate(model, "a")
    peftcore.activate(model, NAMES, per_sample=True)
    torch.testing.assert_close(model(input_ids=tokens()).logits, found)


def test_gradients_are_those_of_each_alone(model):
    def gradients(name, batch):
        parameters = [p for _, p in adapter_parameters(model, name)]
        return torch.autograd.grad(model(input_ids=batch).logits.square().sum(), parameters)

    peftcore.activate(model, NAMES, per_sample=True)
    found = {name: gradients(name, tokens()) for name in "ab"}
    for name, rows in (("a", [0, 3]), ("b", [2])):
        peftcore.activate(model, name)
        for one, other in zip(found[name], gradients(name, tokens()[rows]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_an_adapter_that_is_removed_leaves_its_samples_to_the_base(model):
    peftcore.activate(model, NAMES, per_sample=True)
    before = model(input_ids=tokens()).logits
    peftcore.remove(model, "b")
    after = model(input_ids=tokens()).logits
    with peftcore.disabled(model):
        base = model(input_ids=tokens()).logits
    torch.testing.assert_close(after[[0, 3]], before[[0, 3]], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after[2], base[2], rtol=1e-3, atol=1e-4)


def test_what_does_not_fit():
    model = tiny.llama().eval()
    peftcore.apply(model, "lora", adapter="a")
    with pytest.raises(peftcore.PeftcoreError, match="no adapter 'c' is applied"):
        peftcore.activate(model, ["a", "c"], per_sample=True)
    with pytest.raises(peftcore.PeftcoreError, match=r"same adapter twice.* per_sample=True"):
        peftcore.activate(model, ["a", "a"])
    peftcore.activate(model, ["a", None], per_sample=True)
    with pytest.raises(peftcore.PeftcoreError, match=r"2 samples have adapters .* Linear got a batch of 4"):
        model(input_ids=tokens())
    for call in (
        lambda: peftcore.apply(model, "lora", adapter="d"),
        lambda: peftcore.merge(model, undo=True),
        lambda: peftcore.merge_error(model),
    ):
        with pytest.raises(peftcore.PeftcoreError, match="while each sample has its own"):
            call()
    peftcore.activate(model, "a")
    peftcore.merge(model, undo=True)
    with pytest.raises(peftcore.PeftcoreError, match="adapters are merged"):
        peftcore.activate(model, ["a"], per_sample=True)
    peftcore.unmerge(model)
    for method in ("prefix-tuning", "prompt-tuning"):
        other = peftcore.apply(tiny.llama().eval(), method, adapter="whole", num_virtual_tokens=2)
        with pytest.raises(peftcore.PeftcoreError, match=r"'whole' .* acts on the batch as a whole"):
            peftcore.activate(other, ["whole", None], per_sample=True)


class TwoOutputs(nn.Module):
    """A layer that gives, beside its output, something that all samples share."""

    def __init__(self, shared):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.shared = shared

    def forward(self, x):
        return self.inner(x), self.shared


class ScaledOfTwo(tiny.Scaled):
    def forward(self, base, x):
        y, shared = base(x)
        return self.gain * y, self.gain * shared


def test_what_all_samples_share_is_shared():
    def place(model, config, architecture):
        return [Around("0", ScaledOfTwo(config.value))]

    x = torch.randn(3, 4)
    with tiny.installed(tiny.method("two", place)):
        for shared in (torch.ones(1, 2), torch.ones(4, 2)):
            model = nn.Sequential(TwoOutputs(shared)).eval()
            peftcore.apply(model, "two", adapter="a")
            peftcore.activate(model, [None, "a", None], per_sample=True)
            if len(shared) == 1:
                y, found = model(x)
                torch.testing.assert_close(y, model[0].inner(x) * torch.tensor([1.0, 2, 1])[:, None])
                assert torch.equal(found, torch.tensor([[1.0, 1.0], [2.0, 2.0], [1.0, 1.0]]))
            else:
                with pytest.raises(peftcore.PeftcoreError, match=r"outputs of shape \[4, 2\] for 2 samples cannot"):
                    model(x)
