"""Every public function as the first thing that a process does with peftcore, in three surroundings.

    python first_calls.py     prints {function: {surroundings: the model's answer}}

`plain`; `planned`: after a `plan`, which works on meta tensors; `meta`: under `torch.device("meta")`, as a caller has
it who builds a model without memory. Each runs in a fork of a process that has imported PyTorch and transformers, and
of peftcore nothing.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import transformers  # noqa: F401
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore

SURROUNDINGS = ("plain", "planned", "meta")
TOKENS = torch.tensor([[5, 17, 3, 60]])


def llama() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("cpu"):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).eval()


def suggested() -> float:
    found = peftcore.suggest(llama().config, ["lora"], memory="1GB", device="t4", length=5, max_ways=1)
    return float(found.ways[0].estimate.peak)


def lora(method: str = "lora") -> nn.Module:
    """A model with adapters that act, made in ordinary surroundings."""
    with torch.device("cpu"):
        return peftcore.apply(llama(), method, init_lora_weights=False)


def answer(model: nn.Module) -> list[float]:
    with torch.device("cpu"), torch.no_grad():
        return model(TOKENS).logits.flatten()[:8].tolist()


def applying(method: str, **fields: Any) -> Callable[[], nn.Module]:
    return lambda: peftcore.apply(llama(), method, **fields)


def of_adapted(act: Callable[[nn.Module], Any], method: str = "lora") -> Callable[[], nn.Module]:
    def run() -> nn.Module:
        model = lora(method)
        act(model)
        return model

    return run


def disabled() -> list[float]:
    with peftcore.disabled(lora()) as model:
        return answer(model)


def merged() -> nn.Module:
    model = lora()
    with torch.device("cpu"):
        peftcore.merge(model, undo=True)
    return model


def saved(act: Callable[[str], nn.Module], model: nn.Module) -> nn.Module:
    """What `act` makes of the folder to which `model` was saved."""
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("cpu"):
            if hasattr(model, "_peftcore_state"):
                peftcore.save(model, folder)
            else:
                model.save_pretrained(folder)
        return act(folder)


def written(write: Callable[[nn.Module, str], Any]) -> Callable[[], nn.Module]:
    """A new model with what `write` writes of one that has adapters."""

    def run() -> nn.Module:
        model = lora()
        with tempfile.TemporaryDirectory() as folder:
            write(model, f"{folder}/adapter")
            with torch.device("cpu"):
                return peftcore.load(llama(), f"{folder}/adapter")

    return run


def quantized_by_transformers(folder: str) -> nn.Module:
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=peftcore.FourBitConfig())


FUNCTIONS: dict[str, Callable[[], nn.Module | list[float]]] = {
    "FourBitConfig": lambda: saved(quantized_by_transformers, llama()),
    "activate": of_adapted(lambda model: peftcore.activate(model, [])),
    "after_step": of_adapted(lambda model: peftcore.after_step(model, 1, 1)),
    "apply": applying("lora", init_lora_weights=False),
    "apply adapter": applying("adapter"),
    "apply prefix-tuning": applying("prefix-tuning", num_virtual_tokens=2),
    "apply prompt-tuning": applying("prompt-tuning", num_virtual_tokens=2),
    "apply qlora": applying("qlora", init_lora_weights=False),
    "combine": of_adapted(lambda model: peftcore.combine(model, ["default"], weights=[0.5], adapter="mixed")),
    "convert": of_adapted(lambda model: peftcore.convert(model, "default", method="lora", r=2, adapter="other")),
    "dequantize": lambda: peftcore.dequantize(peftcore.quantize(llama())),
    "disabled": disabled,
    "estimate": lambda: [float(peftcore.estimate(llama(), "lora", batch_size=2, length=5).peak)],
    "export": written(lambda model, folder: peftcore.export(model, folder, format="vllm")),
    "suggest": lambda: [suggested()],
    "extra_loss": of_adapted(lambda model: peftcore.extra_loss(model)),
    "load": lambda: saved(lambda folder: peftcore.load(llama(), folder), lora()),
    "loss_terms": of_adapted(lambda model: peftcore.loss_terms(model)),
    "merge": of_adapted(lambda model: peftcore.merge(model, undo=True)),
    "merge_error": of_adapted(lambda model: peftcore.merge_error(model), "qlora"),
    "methods": lambda: [float(len(peftcore.methods()))],
    "parameter_groups": of_adapted(lambda model: peftcore.parameter_groups(model, lr=0.1)),
    "plan": lambda: [float(peftcore.plan(llama(), "lora").trainable_parameters)],
    "quantization.load": lambda: saved(lambda folder: peftcore.quantization.load(folder), llama()),
    "quantize": lambda: peftcore.quantize(llama()),
    "remove": of_adapted(lambda model: peftcore.remove(model)),
    "save": written(peftcore.save),
    "scale": of_adapted(lambda model: peftcore.scale(model, "default", 0.5)),
    "state_dict": of_adapted(lambda model: peftcore.state_dict(model, "default")),
    "set_state_dict": of_adapted(
        lambda model: peftcore.set_state_dict(model, "default", peftcore.state_dict(model, "default"))
    ),
    "summary": lambda: [float(peftcore.summary(lora()).trainable_parameters)],
    "unmerge": lambda: peftcore.unmerge(merged()),
}


def outcome(function: str, surroundings: str) -> list[float] | str:
    """What the model answers afterwards, or why there is no right answer."""
    if surroundings == "planned":
        with torch.device("cpu"):
            model = llama()
        peftcore.plan(model, "lora")
        del model
    try:
        with torch.device("meta") if surroundings == "meta" else nullcontext():
            result = FUNCTIONS[function]()
    except Exception:
        return traceback.format_exc()[-800:]
    if isinstance(result, list):
        return result
    left = [name for name, t in (*result.named_parameters(), *result.named_buffers()) if t.is_meta]
    if left:
        return f"on meta: {left}"
    held = (m for name, m in list(sys.modules.items()) if name.partition(".")[0].startswith("peftcore"))
    left = [name for m in held for name, value in vars(m).items() if isinstance(value, Tensor) and value.is_meta]
    return f"on meta, for good: {left}" if left else answer(result)


def forked(function: str, surroundings: str) -> list[float] | str:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writer, "w") as pipe:
            json.dump(outcome(function, surroundings), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else "the process died"


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    llama()(TOKENS)
    json.dump({name: {there: forked(name, there) for there in SURROUNDINGS} for name in FUNCTIONS}, sys.stdout)
