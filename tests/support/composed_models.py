"""What tests of adapters made of adapters share: a model with biases, one of convolutions, and what either computes."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn

from support import tiny
from support.against_peft import quiet


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=96, intermediate_size=48, **sizes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(96, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(torch.relu(self.one(x))).flatten(1))


def output(model: nn.Module) -> Tensor:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with torch.no_grad():
        return model(tiny.IMAGES) if isinstance(inner, Images) else quiet(model, **tiny.inputs(inner)).logits
