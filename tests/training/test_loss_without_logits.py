"""The loss of causal language models from hidden states: the same losses and gradients as from logits."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import tiny
from support.checkpointing import enable_checkpointing
from torch import Tensor, nn

import peftcore
from peftcore.engine.adaptation.fused_forward import is_without_logits
from peftcore.ops.linear_cross_entropy import LinearCrossEntropy

LABELS = tiny.TOKENS.masked_fill(tiny.TOKENS == 9, -100)
SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.3},
    "phi3": {},
    "olmo2": {},
    "mixtral": {**EXPERTS, "output_router_logits": True},
    "qwen3_moe": {**EXPERTS, "output_router_logits": True},
    "gpt_neox": {},
    "stablelm": {},
    "starcoder2": {},
    "nemotron": {},
    "phi": {},  # its head has a bias
    "gpt2": {},  # its head is tied
}


def family(name: str) -> Any:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[name](**{**SIZES, **FAMILIES[name]})
    return transformers.AutoModelForCausalLM.from_config(config)


def adapted(model: nn.Module, **options: Any) -> Any:
    peftcore.apply(model, "lora", r=4, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def step(model: nn.Module, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and all gradients of a training step."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    loss = model(**{"input_ids": tiny.TOKENS, "labels": LABELS, **inputs}).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]], tolerance: float) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=tolerance / 4, atol=tolerance / 4)
    assert one[1].keys() == other[1].keys() and one[1]
    for name, grad in one[1].items():
        torch.testing.assert_close(grad, other[1][name], rtol=0, atol=tolerance * float(grad.abs().max()), msg=name)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each loss that was computed without logits."""
    rows, original = list[int](), LinearCrossEntropy.compute

    def compute(self: LinearCrossEntropy) -> tuple[Tensor, Tensor]:
        rows.append(len(self.hidden))
        return original(self)

    monkeypatch.setattr(LinearCrossEntropy, "compute", compute)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_each_family(name: str, dtype: torch.dtype, computed: list[int]) -> None:
    model = adapted(family(name).to(dtype), target_modules="all-linear")
    wanted = step(model)
    assert computed == []
    found = step(peftcore.loss_without_logits(model))
    assert computed[-1] == tiny.TOKENS.numel()
    same(found, wanted, 1e-5 if dtype is torch.float32 else 4e-2)
    peftcore.loss_without_logits(model, enabled=False)
    same(step(model), wanted, 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_as_near_to_float64_as_the_loss_of_logits(dtype: torch.dtype) -> None:
    model = adapted(family("llama")).to(dtype)
    wanted = step(copy.deepcopy(model).double())
    errors = []
    for enabled in (False, True):
        found = step(peftcore.loss_without_logits(model, enabled=enabled))
        errors.append(max(float((found[1][n] - g).norm() / g.norm()) for n, g in wanted[1].items()))
    assert errors[1] < 1.1 * errors[0]


# --- heads -----------------------------------------------------------------------------------------------------------


def test_a_trained_head_and_a_full_model(computed: list[int]) -> None:
    for make in (lambda: adapted(tiny.llama(), modules_to_save=["lm_head"]), tiny.llama, lambda: family("gpt2")):
        model = make().requires_grad_(True) if make is not tiny.llama else make()
        wanted = step(model)
        assert any("head" in name or "wte" in name for name in wanted[1])
        same(step(peftcore.loss_without_logits(model)), wanted, 1e-5)
        assert computed.pop() == tiny.TOKENS.numel()


def test_a_head_in_4_bits(computed: list[int]) -> None:
    model = tiny.llama()
    peftcore.quantize(model, skip=[])
    assert model.lm_head.is_quantized
    adapted(model)
    wanted = step(model)
    same(step(peftcore.loss_without_logits(model)), wanted, 1e-5)
    assert computed


def test_an_adapted_head() -> None:
    """It is refused; one that is adapted later makes its logits."""
    model = peftcore.loss_without_logits(tiny.llama())
    adapted(model, target_modules=["q_proj", "lm_head"])
    wanted = step(model)
    assert "lm_head.peftcore.default.lora_A" in wanted[1]
    assert model(input_ids=tiny.TOKENS, labels=LABELS).logits.shape == (2, 7, 96)
    with pytest.raises(peftcore.PeftcoreError, match="adapters of its head are active"):
        peftcore.loss_without_logits(model)
    assert not is_without_logits(model)
    same(step(model), wanted, 1e-7)


def test_new_tokens_of_tied_embeddings() -> None:
    model = family("gpt2")
    peftcore.apply(model, "lora", r=4, trainable_token_indices=[3, 4])
    wanted = step(model)
    try:
        peftcore.loss_without_logits(model)
    except peftcore.PeftcoreError as error:
        assert "adapters of its head are active" in str(error)
    same(step(model), wanted, 1e-5)


def test_hooks_of_the_head_see_logits() -> None:
    model = peftcore.loss_without_logits(tiny.llama()).train()
    seen = list[torch.Size]()
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(input_ids=tiny.TOKENS, labels=LABELS)
    assert seen == [(2, 7, 96)]


# --- calls -----------------------------------------------------------------------------------------------------------


def test_arguments_of_the_loss(computed: list[int]) -> None:
    shifted = nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:].contiguous()
    for inputs in (
        {"num_items_in_batch": torch.tensor(5)},
        {"num_items_in_batch": 5},
        {"shift_labels": shifted},
        {"attention_mask": torch.ones_like(tiny.TOKENS), "use_cache": False},
    ):
        model = adapted(tiny.llama())
        wanted = step(model, **inputs)
        same(step(peftcore.loss_without_logits(model), **inputs), wanted, 1e-5)
    assert computed


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, computed: list[int]) -> None:
    model = adapted(tiny.llama())
    enable_checkpointing(model, {"use_reentrant": reentrant})
    model.enable_input_require_grads()
    wanted = step(model)
    same(step(peftcore.loss_without_logits(model)), wanted, 1e-5)
    assert computed


def test_autocast(computed: list[int]) -> None:
    model = adapted(tiny.llama(), modules_to_save=["lm_head"])
    with torch.autocast("cpu", torch.bfloat16):
        wanted = step(model)
        same(step(peftcore.loss_without_logits(model)), wanted, 4e-2)
    assert computed


def test_reading_the_logits_says_how_to_get_them() -> None:
    model = peftcore.loss_without_logits(adapted(tiny.llama())).train()
    output = model(input_ids=tiny.TOKENS, labels=LABELS)
    uses = [
        lambda x: x.argmax(-1),
        lambda x: x[..., :-1, :],
        lambda x: torch.softmax(x, -1),
        lambda x: x.shape,
        list,
        lambda x: torch.ones(1) * x,
    ]
    for use in uses:
        for logits in (output.logits, output["logits"], output[1]):
            with pytest.raises(peftcore.PeftcoreError, match=r"were not computed, because.*without labels"):
                use(logits)
    with pytest.raises(peftcore.PeftcoreError, match="pass return_dict=True"):
        model(input_ids=tiny.TOKENS, labels=LABELS, return_dict=False)
    assert model(input_ids=tiny.TOKENS).logits.shape == (2, 7, 96)
    assert model.eval()(input_ids=tiny.TOKENS, labels=LABELS).logits.shape == (2, 7, 96)
    assert model.generate(tiny.TOKENS, max_new_tokens=2, do_sample=False).shape == (2, 9)


def test_an_error_within_a_call_ends_it() -> None:
    model = peftcore.loss_without_logits(tiny.llama()).train()
    with pytest.raises(IndexError, match="labels must be from 0 to 95"):
        model(input_ids=tiny.TOKENS, labels=LABELS + 90)
    assert model.lm_head(torch.zeros(1, 3, 32)).shape == (1, 3, 96)


def test_copies_and_files_of_the_model() -> None:
    model = peftcore.loss_without_logits(adapted(tiny.llama()))
    wanted = step(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert "the loss is computed without logits" in str(peftcore.summary(other))
        same(step(other), wanted, 1e-7)
        assert not is_without_logits(peftcore.loss_without_logits(other, enabled=False))
    same(step(model), wanted, 1e-7)
    peftcore.remove(model, "default")
    assert is_without_logits(model)


def test_parameters_of_a_functional_call() -> None:
    results = []
    for enabled in (False, True):
        model = peftcore.loss_without_logits(
            adapted(tiny.llama(), modules_to_save=["lm_head"]), enabled=enabled
        ).train()
        given = {n: (p * 1.5).detach().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
        output = torch.func.functional_call(model, given, kwargs={"input_ids": tiny.TOKENS, "labels": LABELS})
        output.loss.backward()
        results.append((output.loss.detach(), {name: p.grad for name, p in given.items() if p.grad is not None}))
    same(results[1], results[0], 2e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_models() -> None:
    model = peftcore.loss_without_logits(adapted(tiny.llama())).train()
    wanted = step(model)
    compiled = torch.compile(model, backend="aot_eager")
    same(step(compiled), (wanted[0], {f"_orig_mod.{name}": grad for name, grad in wanted[1].items()}), 1e-5)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    same(step(model), wanted, 1e-5)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_other_losses_are_refused() -> None:
    class Squared(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
            output = super().forward(input_ids, labels=labels, **kwargs)
            if labels is not None:
                output.loss = output.loss + output.logits.square().mean()
            return output

    config = transformers.LlamaConfig(**SIZES)
    seq2seq = transformers.T5Config(vocab_size=96, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4)
    own = transformers.LlamaForCausalLM(config)
    own.loss_function = nn.functional.cross_entropy
    for model, why in (
        (Squared(config), "without logits, the loss of a few tokens has a relative error|it raises"),
        (own, "its loss_function is cross_entropy"),
        (transformers.T5ForConditionalGeneration(seq2seq), "the model does not compute its loss by a loss_function"),
        (tiny.bert_classifier(), "has no linear head for logits of tokens"),
    ):
        with pytest.raises(peftcore.PeftcoreError, match=why):
            peftcore.loss_without_logits(model)
        assert not is_without_logits(model)


def test_a_cap_that_the_config_does_not_name_is_refused() -> None:
    class Capped(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
            logits = 50 * torch.tanh(self.lm_head(self.model(input_ids).last_hidden_state) / 50)
            loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
            return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    torch.manual_seed(0)
    model = Capped(transformers.LlamaConfig(**SIZES))
    with pytest.raises(peftcore.PeftcoreError, match="the loss of a few tokens has a relative error"):
        peftcore.loss_without_logits(model)


# --- trainers --------------------------------------------------------------------------------------------------------


def trained(enabled: bool, folder: Path) -> list[dict[str, float]]:
    from transformers import Trainer, TrainingArguments

    class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            tokens = torch.randint(3, 96, (9,), generator=torch.Generator().manual_seed(index))
            return {"input_ids": tokens, "labels": tokens}

    model = peftcore.loss_without_logits(adapted(tiny.llama()), enabled=enabled)
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


def test_trainer_with_metrics(tmp_path: Path, computed: list[int]) -> None:
    runs = [trained(enabled, tmp_path) for enabled in (False, True)]
    for name in ("loss", "grad_norm", "eval_loss", "eval_accuracy"):
        wanted, found = ([entry[name] for entry in run if name in entry] for run in runs)
        assert len(found) == (2 if "eval" in name else 4) and found == pytest.approx(wanted, rel=1e-5)
    assert computed[-8:] == [18] * 8


def test_ddp_that_looks_for_unused_parameters(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = adapted(tiny.llama()).train()
        wanted = step(model)
        parallel = nn.parallel.DistributedDataParallel(peftcore.loss_without_logits(model), find_unused_parameters=True)
        loss, found = step(parallel)
        del parallel  # before its process group: freed after it, DDP waits for Gloo's thread for ever
    finally:
        torch.distributed.destroy_process_group()
    same((loss, {name.removeprefix("module."): grad for name, grad in found.items()}), wanted, 1e-5)


def test_a_model_that_is_sharded_afterwards(tmp_path: Path) -> None:
    """FSDP2 frees the weight of the head after the forward pass."""
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = peftcore.loss_without_logits(tiny.llama().train())
        wanted, _ = step(model)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        output = model(input_ids=tiny.TOKENS, labels=LABELS)
        assert output.logits.shape == (2, 7, 96)
        torch.testing.assert_close(output.loss.detach(), wanted)
        with pytest.raises(peftcore.PeftcoreError, match="the model is sharded"):
            peftcore.loss_without_logits(model)
    finally:
        torch.distributed.destroy_process_group()
