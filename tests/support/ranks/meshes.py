"""What the ranks of tests/distributed/test_mesh.py do: eight kinds of methods on bases that are divided in six ways."""

from __future__ import annotations

import os
import signal
import warnings
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.nn import functional as F

import peftcore
from peftcore.plugin import ranks
from peftcore.testing import disturb
from support.ranks.bases import base
from support.ranks.parts import attention_of_parts
from support.ranks.tensor_parallel import by_hooks
from support.ranks.work import TOKENS, farthest, values

WAYS = ("tp_plan", "parallelize_module", "FSDP2 and tp_plan", "expert parallel", "pipeline", "parts of sequences")
ATTENTION = {"target_modules": ["q_proj", "o_proj"]}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("lora", {"r": 3, **ATTENTION}),
    "QLoRA": ("qlora", {"r": 3, "blocksize": 32, **ATTENTION}),
    "DoRA": ("dora", {"r": 3, **ATTENTION}),
    "IA3": ("ia3", {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}),
    "adapters": ("adapter", {"bottleneck_size": 5}),
    "prefixes": ("prefix-tuning", {"num_virtual_tokens": 3}),
    "BitFit": ("bitfit", {}),
    "LoRA on experts": ("lora", {"r": 3, "target_modules": ["experts"]}),
}
SKIP = ["lm_head", "gate", "experts"]  # of QLoRA, where the ranks share out experts
READ, NEXT = TOKENS[:, :6], TOKENS[:, 1:7]


def kind_of(way: str, name: str) -> str:
    """A folder of `bases.write`: with experts where they are divided or adapted, with biases for BitFit.

    For QLoRA, with halves of whole blocks.
    """
    if way == "expert parallel" or name == "LoRA on experts":
        return "qwen3_moe"
    return {"BitFit": "odd", "QLoRA": "blocks"}.get(name, "llama")


def divided(way: str, folder: str, kind: str) -> nn.Module:
    sizes: dict[str, dict[str, int]] = {
        "tp_plan": {"tp_size": 2},
        "FSDP2 and tp_plan": {"tp_size": 2, "fsdp_size": 2},
        "expert parallel": {"tp_size": 2, "ep_size": 2},
    }
    return by_hooks(folder, kind) if way == "parallelize_module" else base(folder, kind, **sizes.get(way, {}))


def adapted(found: nn.Module, name: str) -> nn.Module:
    torch.manual_seed(7)
    method, fields = METHODS[name]
    if name == "QLoRA" and hasattr(found.config, "num_experts"):
        fields = {**fields, "skip": SKIP}
    peftcore.apply(found, method, **fields)
    disturb(found, "default", seed=1, std=0.05)
    return found.train()


class Part(nn.Module):
    """Stage of a model in a pipeline of two."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        inner, half = whole.model, len(whole.model.layers) // 2 + 1
        first = ranks.rank() == 0
        self.rotary = inner.rotary_emb
        self.embed = inner.embed_tokens if first else None
        self.layers = nn.ModuleList(list(inner.layers)[:half] if first else list(inner.layers)[half:])
        self.norm, self.head = (None, None) if first else (inner.norm, whole.lm_head)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.embed is None else self.embed(x)
        places = torch.arange(hidden.shape[1])[None]
        turned = self.rotary(hidden, places)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_ids=places, position_embeddings=turned)
        return hidden if self.norm is None else self.head(self.norm(hidden))


def loss(logits: Tensor, labels: Tensor = NEXT) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Run:
    """A model divided in one way, with its optimizer."""

    def __init__(self, way: str, folder: str, name: str) -> None:
        self.way, self.whole = way, adapted(divided(way, folder, kind_of(way, name)), name)
        self.part: nn.Module = self.whole
        if way in ("FSDP2 and tp_plan", "parts of sequences"):
            peftcore.shard(self.whole)
        if way == "pipeline":
            from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

            self.part = Part(self.whole)
            self.joined()  # raises where a stage lacks something that trains
            stage = PipelineStage(self.part, ranks.rank(), 2, torch.device("cpu"))
            self.schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss)
        self.optimizer = optimizer_of(self.part)

    def step(self) -> None:
        if self.way == "pipeline":
            self.schedule.step(READ) if ranks.rank() == 0 else self.schedule.step(target=NEXT)
        elif self.way == "parts of sequences":
            tokens, labels = (each.chunk(2, 1)[ranks.rank()] for each in (READ, NEXT))
            places = torch.arange(6)[None].chunk(2, 1)[ranks.rank()].expand(len(tokens), -1)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(F, "scaled_dot_product_attention", attention_of_parts)
                logits = self.whole(input_ids=tokens, position_ids=places, use_cache=False).logits
                loss(logits, labels).backward()
        else:
            rows = (
                slice(0, 6)
                if self.way != "FSDP2 and tp_plan"
                else slice(ranks.rank() // 2 * 3, ranks.rank() // 2 * 3 + 3)
            )
            loss(self.whole(input_ids=READ[rows]).logits, NEXT[rows]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def joined(self) -> nn.Module:
        return peftcore.distributed.join_stages(self.whole, self.part) if self.way == "pipeline" else self.whole


def optimizer_of(found: nn.Module) -> torch.optim.Optimizer:
    """AdamW that does not enlarge the rounding of tiny gradients."""
    return torch.optim.AdamW([p for p in found.parameters() if p.requires_grad], lr=0.01, eps=1e-3, foreach=False)


def step_alone(found: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    loss(found(input_ids=READ).logits).backward()
    optimizer.step()
    optimizer.zero_grad()
    return values(found)


def measured(way: str, name: str, folder: str) -> dict[str, float] | str:
    """Differences from one process: after two steps, in the file, and after a third step of a resumed run."""
    try:
        if way == "parts of sequences" and name == "prefixes":
            return refused_in_context_parallel(folder)
        spread = Run(way, folder, name)
        kind, where = kind_of(way, name), f"{folder}/{way}/{name}"
        alone = adapted(base(folder, kind), name)
        of_alone, start = optimizer_of(alone), values(alone)
        for _ in range(2):
            spread.step()
            wanted = step_alone(alone, of_alone)
        whole = spread.joined()
        assert farthest(wanted, start) > 1e-3
        here = values(whole)
        peftcore.save(whole, f"{where}/adapter")
        dcp.save({"training": peftcore.TrainingState(whole, spread.optimizer)}, checkpoint_id=f"{where}/state")
        distributed.barrier()
        loaded = base(folder, kind)
        if name == "QLoRA":
            peftcore.quantize(loaded, blocksize=32, skip=SKIP if kind == "qwen3_moe" else None)
        other = adapted(base(folder, kind), name)
        of_other = optimizer_of(other)
        dcp.load({"training": peftcore.TrainingState(other, of_other)}, checkpoint_id=f"{where}/state", no_dist=True)
        return {
            "equal": farthest(here, wanted),
            "save": farthest(values(peftcore.load(loaded, f"{where}/adapter")), here),
            "resume": farthest(step_alone(other, of_other), step_alone(alone, of_alone)),
        }
    except peftcore.PeftcoreError as error:
        return str(error)


def refused_in_context_parallel(folder: str) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    found, ids = adapted(base(folder, "llama"), "prefixes"), READ.clone()
    with context_parallel(init_device_mesh("cpu", (2,)), buffers=[ids], buffer_seq_dims=[1]):
        found(input_ids=ids)
    raise AssertionError("nothing was raised")


def table(way: str, folder: str) -> dict[str, dict[str, float] | str]:
    warnings.simplefilter("ignore")
    return {name: measured(way, name, folder) for name in METHODS}


def killed(way: str, folder: str) -> dict[str, str]:
    """What rank 0 raises in `save` of each method where rank 1 has died, or before its stage is joined."""
    warnings.simplefilter("ignore")
    runs: dict[str, Run] = {}
    found: dict[str, str] = {}
    for name in METHODS:
        try:
            if way == "parts of sequences" and name == "prefixes":
                found[name] = refused_in_context_parallel(folder)
            runs[name] = Run(way, folder, name)
        except peftcore.PeftcoreError as error:
            found[name] = str(error)
    if ranks.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    for name, spread in runs.items():
        try:
            peftcore.save(spread.joined(), f"{folder}/killed, {way}, {name}")
            found[name] = "nothing was raised"
        except peftcore.PeftcoreError as error:
            found[name] = str(error)
    return found
