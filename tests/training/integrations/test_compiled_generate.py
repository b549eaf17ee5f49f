"""`generate` with a static cache and a compiled step: the tokens of the model as it is, whatever was done to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny
from support.releases import TORCH_2_9
from torch import Tensor, nn

import peftcore

PROMPT = torch.tensor([[5, 17, 42, 8], [0, 0, 61, 23]])


class Compiled:
    """Generates with a step compiled as one graph; `graphs` has them. PyTorch 2.9 compiles one for each new cache."""

    def __init__(self, model: nn.Module) -> None:
        from transformers.generation.configuration_utils import CompileConfig

        graphs: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, _inputs: list[Any]) -> Any:  # a function: configurations are copied
            graphs.append(graph)
            return graph.forward

        self.model, self.graphs = model, graphs
        self.config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
        self.config._compile_all_devices = True

    def tokens(self, **fields: Any) -> Tensor:
        with torch.no_grad():
            return self.model.generate(  # type: ignore[operator]
                input_ids=PROMPT,
                attention_mask=(PROMPT > 0).long(),
                do_sample=False,
                min_new_tokens=3,
                max_new_tokens=3,
                pad_token_id=0,
                **fields,
            )

    def agrees(self) -> bool:
        compiled = self.tokens(cache_implementation="static", compile_config=self.config)
        return torch.equal(compiled, self.tokens(use_cache=False))


@pytest.fixture
def compiled() -> Any:
    torch._dynamo.reset()
    model = tiny.llama().eval()
    peftcore.quantize(model)
    for name, r in (("first", 4), ("second", 8)):
        peftcore.apply(model, "lora", r=r, adapter=name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    yield Compiled(model.eval())
    torch._dynamo.reset()


def test_a_step_over_four_bits_follows_what_is_done_to_the_adapters(compiled: Compiled) -> None:
    peftcore.activate(compiled.model, "first")
    assert compiled.agrees() and len(compiled.graphs) == 1
    first = compiled.tokens()
    peftcore.activate(compiled.model, "second")
    assert compiled.agrees() and not torch.equal(first, compiled.tokens())
    peftcore.activate(compiled.model, "first")
    assert compiled.agrees()
    assert TORCH_2_9 or len(compiled.graphs) == 2  # the first one's is still there
    with peftcore.disabled(compiled.model):
        assert compiled.agrees()
    peftcore.remove(compiled.model, "second")
    assert compiled.agrees()
    assert torch.equal(first, compiled.tokens())


def test_new_values_need_no_new_graph(compiled: Compiled) -> None:
    peftcore.activate(compiled.model, "first")
    assert compiled.agrees()
    before = compiled.tokens()
    with torch.no_grad():
        for name, parameter in compiled.model.named_parameters():
            if "lora_B" in name:
                parameter.neg_()
    assert compiled.agrees()
    assert TORCH_2_9 or len(compiled.graphs) == 1
    assert not torch.equal(before, compiled.tokens())


def test_a_prompt_refuses_a_static_cache() -> None:
    model = peftcore.apply(tiny.llama().eval(), "prompt-tuning", num_virtual_tokens=3)
    with pytest.raises(peftcore.PeftcoreError, match=r"If you generate with a static cache, use the dynamic cache"):
        Compiled(model).tokens(cache_implementation="static", disable_compile=True)
