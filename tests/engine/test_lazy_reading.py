"""Logits that are read late, after changes, without gradients or through raw memory: the same values, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from lazily import LABELS, adapted, same, shifted, step
from torch import Tensor, nn
from torch.nn import functional as F

import peftcore
from peftcore.engine.lazy_head import has_lazy_logits, lazily_evaluated
from peftcore.engine.lazy_tensor import LazyLogits

CHANGED = r"have changed since. Read the logits before optimizer.step\(\)"


def trained_head(enabled: bool = True) -> nn.Module:
    model = adapted(tiny.llama(), modules_to_save=["lm_head"]).train()
    return peftcore.lazy_logits(model, enabled=enabled)


def added_to_data(p: nn.Parameter) -> None:
    p.data.add_(0.01)


def replaced_data(p: nn.Parameter) -> None:
    p.data = p.data + 0.01


def through_numpy(p: nn.Parameter) -> None:
    p.detach().numpy()[...] += 0.01


def smallest_step(p: nn.Parameter) -> None:
    p.data[7, 3].mul_(1 + 2**-22)


@pytest.mark.parametrize("change", [added_to_data, replaced_data, through_numpy, smallest_step])
def test_changes_of_a_trained_head_that_count_no_version(change: Callable[[nn.Parameter], None]) -> None:
    """As optimizers make them that write to `parameter.data`, or whose kernels write to its memory."""
    model = trained_head()
    output = model(input_ids=tiny.TOKENS, labels=LABELS)
    output.loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.shape[0] == 96:
            change(parameter)
    for read in (Tensor.sum, shifted, lambda x: x.argmax(-1), lambda x: torch.ops.aten.exp(x)):
        with pytest.raises(peftcore.PeftcoreError, match=CHANGED):
            read(output.logits)


def test_a_model_converted_after_its_forward() -> None:
    model = peftcore.lazy_logits(adapted(tiny.llama())).train()
    logits = model(input_ids=tiny.TOKENS).logits
    model.to(torch.bfloat16)
    with pytest.raises(peftcore.PeftcoreError, match=CHANGED):
        shifted(logits)


def test_hidden_states_changed_through_data() -> None:
    model = peftcore.lazy_logits(adapted(tiny.llama())).train()
    hidden = model.model(input_ids=tiny.TOKENS)[0] * 1
    logits = model.lm_head(hidden)
    hidden.data.mul_(2)
    with pytest.raises(peftcore.PeftcoreError, match=CHANGED):
        shifted(logits)


@pytest.mark.parametrize(
    "use",
    [
        shifted,
        lambda x: x.log_softmax(-1).gather(-1, tiny.TOKENS[..., None]).sum(),
        lambda x: (x * 2.0).tanh().sum(),
        lambda x: x.float().argmax(-1).sum(),
    ],
)
def test_without_gradients(use: Callable[[Tensor], Tensor], computed: list[int]) -> None:
    """What is made under `no_grad` has none, and a loss computed there does not keep a later one from the logits."""
    results = []
    for enabled in (False, True):
        model = trained_head(enabled)
        logits = model(input_ids=tiny.TOKENS).logits
        with torch.no_grad():
            found = use(logits)
        assert not found.requires_grad
        logits.retain_grad()
        shifted(logits).backward()
        assert logits.grad.abs().sum() > 0
        results.append((found.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    same(results[1], results[0], 2e-5)


@pytest.mark.parametrize("kind", ["adapter", "head", "4 bits", "bf16", "tied"])
def test_evaluation(kind: str, computed: list[int]) -> None:
    """A loss in evaluation takes no logits, is the same to rounding, and what was switched on or off stays so."""
    model = tiny.gpt2() if kind == "tied" else tiny.llama()
    if kind == "4 bits":
        peftcore.quantize(model, skip=[])
    adapted(model, **({"target_modules": ["q_proj", "lm_head"]} if kind == "head" else {}))
    if kind == "bf16":
        model.bfloat16()
    for enabled in (False, True):
        peftcore.lazy_logits(model, enabled=enabled).eval()
        with torch.no_grad():
            wanted = model(input_ids=tiny.TOKENS, labels=LABELS)
            with lazily_evaluated(model):
                found = model(input_ids=tiny.TOKENS, labels=LABELS)
        assert type(found.logits) is LazyLogits and type(wanted.logits) is Tensor and computed == [0]
        torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-5)
        assert not found.loss.requires_grad and has_lazy_logits(model) is enabled


def test_evaluation_of_a_model_without_a_linear_head() -> None:
    with lazily_evaluated(tiny.bert_classifier().eval()), torch.no_grad():
        pass


def zeroed_data(x: Tensor) -> None:
    x.data.zero_()


def zeroed_numpy(x: Tensor) -> None:
    x.detach().numpy()[...] = 0


def set_data(x: Tensor) -> None:
    x.data = torch.zeros(2, 7, 96)


@pytest.mark.parametrize("change", [zeroed_data, zeroed_numpy, set_data])
def test_changes_of_the_logits_that_count_no_version(change: Callable[[Tensor], None]) -> None:
    logits = peftcore.lazy_logits(adapted(tiny.llama())).train()(input_ids=tiny.TOKENS).logits
    change(logits)
    torch.testing.assert_close(shifted(logits), torch.tensor(96.0).log())


def test_shapes_of_views_and_copies_are_those_of_plain_logits(computed: list[int]) -> None:
    results = []
    for enabled in (False, True):
        logits = peftcore.lazy_logits(adapted(tiny.llama()), enabled=enabled).train()(input_ids=tiny.TOKENS).logits
        cut = logits[..., :-1, :]
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            cut.view(-1, 96)
        facts = [(x.is_contiguous(), x.stride(), x.shape) for x in (logits, cut, cut.reshape(-1, 96), logits[0])]
        assert computed == [0]
        results.append(facts)
    assert results[0] == results[1]


def test_a_copy_by_reshape_or_contiguous_is_not_changed_with_its_logits() -> None:
    results = []
    for enabled in (False, True):
        logits = peftcore.lazy_logits(adapted(tiny.llama()), enabled=enabled).train()(input_ids=tiny.TOKENS).logits
        copied, viewed = logits[:, :-1].reshape(-1, 96), logits.view(-1, 96).contiguous()
        logits[:, 0] = 0
        results.append((F.cross_entropy(copied, tiny.TOKENS[:, 1:].reshape(-1)), viewed.sum()))
    torch.testing.assert_close(results[0], results[1])


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch._C._nn.gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def test_gradients_of_gradients_are_an_error() -> None:
    model = trained_head()
    for use in (lambda x: Doubled.apply(x).sum(), shifted):
        loss = use(model(input_ids=tiny.TOKENS).logits)
        with pytest.raises((peftcore.PeftcoreError, RuntimeError), match="cannot be differentiated twice"):
            torch.autograd.grad(loss, list(model.lm_head.parameters())[:1], create_graph=True)


def test_hooks_of_the_head_see_ordinary_tensors() -> None:
    seen: list[type] = []
    model = trained_head()
    with model.lm_head.register_forward_hook(lambda module, args, output: seen.extend([type(args[0]), type(output)])):
        wanted = step(model)
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert type(model(input_ids=tiny.TOKENS).logits) is Tensor
    assert seen == [Tensor, Tensor]
    same(step(model), wanted, 1e-5)
    assert type(model(input_ids=tiny.TOKENS).logits) is LazyLogits


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model(reentrant: bool) -> None:
    results = []
    for enabled in (False, True):
        model = trained_head(enabled)
        embeddings = model.get_input_embeddings()(tiny.TOKENS).detach().requires_grad_()
        logits = torch.utils.checkpoint.checkpoint(
            lambda x, model=model: model(inputs_embeds=x).logits, embeddings, use_reentrant=reentrant
        )
        loss = shifted(logits)
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    same(results[1], results[0], 2e-5)


def test_loss_scaling_in_fp16(computed: list[int]) -> None:
    results = []
    for enabled in (False, True):
        model = trained_head(enabled)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=tiny.TOKENS, labels=LABELS).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    same(results[1], results[0], 4e-3)
    assert computed == [0]
