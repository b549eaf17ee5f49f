"""Logits that are computed only if they are read: the same losses, gradients and values, whatever is done with them."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from lazily import LABELS, adapted, same, shifted, step
from torch import Tensor, nn
from torch.nn import functional as F

import peftcore
from peftcore.engine.lazy_head import has_lazy_logits
from peftcore.engine.lazy_tensor import LazyLogits


def family(name: str) -> nn.Module:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
    sizes |= {"gemma2": {"final_logit_softcapping": 3.0}, "granite": {"logits_scaling": 4.0}}.get(name, {})
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} if name == "cohere" else {}
    if name == "phi":  # its head has a bias
        sizes.pop("head_dim")
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere", "phi", "gpt2", "qwen3_moe"])
def test_a_step_of_each_kind_of_head(name: str, dtype: torch.dtype, computed: list[int]) -> None:
    """Capped, scaled, tied, with a bias: no logits are computed."""
    model = adapted((tiny.gpt2() if name == "gpt2" else family(name)).to(dtype), target_modules="all-linear")
    wanted = step(model)
    found = step(peftcore.lazy_logits(model))
    same(found, wanted, 1e-5 if dtype is torch.float32 else 3e-2)
    assert computed == [0]
    assert not has_lazy_logits(peftcore.lazy_logits(model, enabled=False))
    same(step(model), wanted, 1e-7)


def test_a_trained_head_and_a_full_model(computed: list[int]) -> None:
    for make in (lambda: adapted(tiny.llama(), modules_to_save=["lm_head"]), tiny.llama):
        model = make().requires_grad_(True) if make is tiny.llama else make()
        wanted = step(model)
        assert any("head" in name or "embed" in name for name in wanted[1])
        same(step(peftcore.lazy_logits(model)), wanted, 1e-5)
    assert computed == [0]


def test_a_head_in_4_bits(computed: list[int]) -> None:
    model = tiny.llama()
    peftcore.quantize(model, skip=[])
    assert model.lm_head.is_quantized
    adapted(model)
    wanted = step(model)
    same(step(peftcore.lazy_logits(model)), wanted, 1e-5)
    assert computed == [0]


def test_options_of_a_call(computed: list[int]) -> None:
    model = adapted(tiny.llama())
    for inputs in ({"num_items_in_batch": torch.tensor(5)}, {"attention_mask": torch.ones_like(tiny.TOKENS)}):
        peftcore.lazy_logits(model, enabled=False)
        wanted = step(model, **inputs)
        same(step(peftcore.lazy_logits(model), **inputs), wanted, 1e-5)
    assert model(input_ids=tiny.TOKENS, logits_to_keep=2).logits.shape == (2, 2, 96)
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    peftcore.lazy_logits(model, enabled=False)
    wanted = step(model)
    same(step(peftcore.lazy_logits(model)), wanted, 1e-5)
    assert computed == [0]


def test_under_autocast(computed: list[int]) -> None:
    model = adapted(tiny.llama(), modules_to_save=["lm_head"])
    with torch.autocast("cpu", torch.bfloat16):
        wanted = step(model)
        same(step(peftcore.lazy_logits(model)), wanted, 3e-2)
        logits = model(input_ids=tiny.TOKENS).logits
    assert computed == [0] and logits.dtype is torch.bfloat16
    peftcore.lazy_logits(model, enabled=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits.clone(), model(input_ids=tiny.TOKENS).logits)  # read outside of autocast


def test_plain_outside_of_training() -> None:
    model = peftcore.lazy_logits(adapted(tiny.llama()))
    assert type(model.eval()(input_ids=tiny.TOKENS).logits) is Tensor
    model.generate(tiny.TOKENS, max_new_tokens=2, do_sample=False)
    with torch.no_grad():
        assert type(model.train()(input_ids=tiny.TOKENS).logits) is Tensor
    with torch.inference_mode():
        assert type(model(input_ids=tiny.TOKENS).logits) is Tensor


# --- whatever is done with logits ------------------------------------------------------------------------------------


def tempered(logits: Tensor) -> Tensor:
    picked = (logits[:, :-1] / 0.7).log_softmax(-1).gather(-1, tiny.TOKENS[:, 1:, None])
    return picked.squeeze(-1).sum()


def set_in_place(logits: Tensor) -> Tensor:
    view = logits[:, 1:]
    logits[:, 2] = 0
    logits.div_(2)
    return shifted(logits) + view.sum() + F.cross_entropy(view.reshape(-1, 96), LABELS[:, 1:].reshape(-1))


def view_changed(logits: Tensor) -> Tensor:
    """A change of a view is one of the whole; a copy taken before is left alone."""
    copied = (logits * 2).float()
    logits[:, :3].mul_(3)
    return shifted(logits) + F.cross_entropy(copied.view(-1, 96), LABELS.view(-1))


def number_changed(logits: Tensor) -> Tensor:
    """An index that is a tensor of one number gives a view, too."""
    column = logits[:, torch.tensor(3)]
    logits[:, 3].mul_(2)
    return shifted(logits) + F.cross_entropy(column, tiny.TOKENS[:, 3])


def both_ways(logits: Tensor) -> Tensor:
    return shifted(logits) + 0.1 * logits.square().mean() + shifted(logits.float() * 0.5)


def per_row(logits: Tensor) -> Tensor:
    rows = zip(logits, tiny.TOKENS, strict=True)
    return torch.stack([F.log_softmax(row, -1).gather(-1, tokens[:, None]).sum() for row, tokens in rows]).sum()


def weighted(logits: Tensor) -> Tensor:
    loss = nn.CrossEntropyLoss(weight=torch.linspace(0.1, 1, 96, dtype=logits.dtype), reduction="sum")
    return loss(logits.flatten(0, 1), LABELS.flatten())


class Doubled(torch.autograd.Function):
    """Reads its argument outside of Python's dispatch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch._C._nn.gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


USES: list[Callable[[Tensor], Tensor]] = [
    *(shifted, tempered, set_in_place, view_changed, number_changed, both_ways, per_row, weighted),
    lambda x: x.sum(),
    lambda x: Doubled.apply(x).sum(),
    lambda x: torch.utils.checkpoint.checkpoint(lambda y: y.square().sum(), x, use_reentrant=False),
    lambda x: x.softmax(-1)[..., 3].sum(),
    lambda x: x[0, 1:3].sum() + x[:, -1, 5].sum() + x[..., 2:4].mean() + x[LABELS > 0].logsumexp(-1).sum(),
    lambda x: F.cross_entropy(x[LABELS > 0], LABELS[LABELS > 0], label_smoothing=0.1),
    lambda x: F.cross_entropy(x.transpose(1, 2), LABELS),
    lambda x: F.cross_entropy(x.view(14, -1), LABELS.view(-1), reduction="none").square().sum(),
    lambda x: F.cross_entropy((x * 0.5).tanh().mul(4).view(-1, 96), LABELS.view(-1)),
    lambda x: F.cross_entropy(x.view(-1, 96).float(), F.one_hot(tiny.TOKENS.view(-1), 96).float()),
    lambda x: F.nll_loss(F.log_softmax(x.view(-1, 96), 1), LABELS.view(-1)),
    lambda x: F.kl_div(x.log_softmax(-1), torch.full_like(x, 1 / 96), reduction="batchmean"),
    lambda x: torch.cat([x, x[:1]]).logsumexp(-1).sum() + sum(part.mean() for part in x.split(1)),
    lambda x: torch.gather(x, -1, tiny.TOKENS[..., None]).sum() - x.logsumexp(-1).sum(),
    lambda x: x.detach().sum() * x.mean() + float(x.detach().max()) * x.clone().sum(),
    lambda x: x.reshape(2, 7, 4, 24).sum((0, 1, 2)).square().sum() + x.unsqueeze(0).mean() + x.T.sum(),
    lambda x: (x / 2 if x.requires_grad and x.dim() == 3 and len(x) == 2 else x).view(-1, 96)[3:5].sum(),
    lambda x: F.cross_entropy(x.view(-1, 96), LABELS.view(-1)) * x.size(-1) / x.numel() * x.shape[1],
]


@pytest.mark.filterwarnings("ignore:The use of `x.T`:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use", USES)
def test_every_use_gives_the_same(use: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    model = adapted(tiny.llama(), modules_to_save=["lm_head"]).to(dtype).train()
    results = []
    for enabled in (False, True):
        peftcore.lazy_logits(model, enabled=enabled)
        model.zero_grad()
        logits = model(input_ids=tiny.TOKENS).logits
        assert (type(logits) is LazyLogits) == enabled
        found = use(logits)
        assert type(found) is Tensor
        found.backward()
        results.append((found.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    same(results[1], results[0], 2e-5 if dtype is torch.float32 else 6e-2)


def test_values_are_those_of_the_head(computed: list[int]) -> None:
    model = adapted(tiny.llama()).train()
    wanted = model(input_ids=tiny.TOKENS).logits
    logits = peftcore.lazy_logits(model)(input_ids=tiny.TOKENS).logits
    assert (logits.shape, logits.dtype, logits.device, logits.requires_grad) == (
        *(wanted.shape, wanted.dtype, wanted.device),
        True,
    )
    assert logits.argmax(-1).tolist() == wanted.argmax(-1).tolist()
    assert (logits.detach().numpy() == wanted.detach().numpy()).all() and logits.tolist() == wanted.tolist()
    assert torch.equal(copy.deepcopy(logits.detach()), wanted) and "tensor(" in repr(logits)
    buffer = io.BytesIO()
    torch.save(logits, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), wanted)
    assert computed == [1]
    assert torch.equal(torch.ops.aten.add.Tensor(logits, 1), wanted + 1)


def test_gradients_of_the_logits_themselves() -> None:
    model = peftcore.lazy_logits(adapted(tiny.llama())).train()
    logits = model(input_ids=tiny.TOKENS).logits
    seen: list[Tensor] = []
    logits.register_hook(seen.append)
    shifted(logits).backward()
    assert seen[0].shape == (2, 7, 96) and seen[0].abs().sum() > 0
    logits = model(input_ids=tiny.TOKENS).logits
    loss = shifted(logits)
    for ask in (logits.retain_grad, lambda: torch.autograd.grad(loss, logits, allow_unused=True)):
        with pytest.raises(peftcore.PeftcoreError, match="computed without its logits, which have no gradient"):
            ask()


def test_values_that_can_no_longer_be_computed() -> None:
    model = peftcore.lazy_logits(adapted(tiny.llama(), modules_to_save=["lm_head"])).train()
    output = model(input_ids=tiny.TOKENS, labels=LABELS)
    output.loss.backward()
    peftcore.optim.AdamW(peftcore.parameter_groups(model, lr=0.1)).step()
    with pytest.raises(peftcore.PeftcoreError, match=r"Read the logits before optimizer.step\(\)"):
        output.logits.sum()


def test_hooks_of_a_forward_see_its_backward() -> None:
    """As the check does whether what trained in a forward is still active in its backward."""
    model = peftcore.lazy_logits(adapted(tiny.llama())).train()
    loss = shifted(model(input_ids=tiny.TOKENS).logits)
    peftcore.activate(model, [])
    with pytest.raises(peftcore.PeftcoreError, match="would be lost"):
        loss.backward()


def test_copies_and_files_of_the_model(tmp_path: Any) -> None:
    model = peftcore.lazy_logits(adapted(tiny.llama()))
    wanted = step(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert has_lazy_logits(other)
        same(step(other), wanted, 1e-7)
    peftcore.merge(model)
    peftcore.unmerge(model)
    peftcore.remove(model, "default")
    assert has_lazy_logits(model) and "logits are computed only if they are read" in str(peftcore.summary(other))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_models_have_plain_logits() -> None:
    model = peftcore.lazy_logits(adapted(tiny.llama())).train()
    wanted = step(model)
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    output = compiled(input_ids=tiny.TOKENS, labels=LABELS)
    assert type(output.logits) is Tensor
    torch.testing.assert_close(output.loss.detach(), wanted[0])


def test_models_without_such_a_head() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="has no linear head for logits of tokens"):
        peftcore.lazy_logits(tiny.bert_classifier())


def trained(enabled: bool, folder: Any) -> list[dict[str, float]]:
    from transformers import Trainer, TrainingArguments

    class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            tokens = torch.randint(3, 96, (9,), generator=torch.Generator().manual_seed(index))
            return {"input_ids": tokens, "labels": tokens}

    model = peftcore.lazy_logits(adapted(tiny.llama()), enabled=enabled)
    options = {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **options),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    trainer.train()
    return trainer.state.log_history


def test_trainer_with_metrics(tmp_path: Any, computed: list[int]) -> None:
    runs = [trained(enabled, tmp_path) for enabled in (False, True)]
    for name in ("loss", "grad_norm", "eval_loss", "eval_accuracy"):
        wanted, found = ([entry[name] for entry in run if name in entry] for run in runs)
        assert len(found) == (2 if "eval" in name else 4) and found == pytest.approx(wanted, rel=1e-5)
    assert computed == [0]


def test_ddp_that_looks_for_unused_parameters(tmp_path: Any, computed: list[int]) -> None:
    """It reads the graph behind a model's outputs, in C++."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = adapted(tiny.llama()).train()
        wanted = step(model)
        model.zero_grad()
        parallel = nn.parallel.DistributedDataParallel(peftcore.lazy_logits(model), find_unused_parameters=True)
        loss = shifted(parallel(input_ids=tiny.TOKENS).logits)
        loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    finally:
        torch.distributed.destroy_process_group()
    same((loss.detach(), found), wanted, 1e-5)


def test_a_model_that_is_sharded_afterwards(tmp_path: Any) -> None:
    """FSDP2 frees the weight of the head after the forward pass, and hooks the gradients of the outputs."""
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = peftcore.lazy_logits(tiny.llama().train())
        wanted, _ = step(model)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        output = model(input_ids=tiny.TOKENS, labels=LABELS)
        assert type(output.logits) is not LazyLogits
        torch.testing.assert_close(output.loss.detach(), wanted)
        with pytest.raises(peftcore.PeftcoreError, match="the model is sharded"):
            peftcore.lazy_logits(model)
    finally:
        torch.distributed.destroy_process_group()


def test_nothing_is_kept_after_a_step() -> None:
    """No cycle of references holds hidden states until the garbage collector runs."""
    model = peftcore.lazy_logits(adapted(tiny.llama())).train()
    gc.collect()
    gc.disable()
    try:
        for use in (shifted, Tensor.sum):
            logits = model(input_ids=tiny.TOKENS).logits
            gone = weakref.ref(logits.recipe), weakref.ref(logits.recipe.head)
            use(logits).backward()
            del logits
            assert [each() for each in gone] == [None, None]
    finally:
        gc.enable()
