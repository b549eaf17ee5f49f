"""It passes the conformance suite, and restarts in the same way on ranks."""

from __future__ import annotations

import pytest
import torch
from peftcore_relora import ReloraConfig
from support import matrix, tiny
from support.processes import run
from support.ranks import restarts

import peftcore


def test_conformance() -> None:
    matrix.conformance(ReloraConfig(r=2, restart_every=2, restart_warmup=1), compile_backend="eager")


@pytest.mark.parametrize("adapter_placement", ["shard", "replicate"])
def test_restarts_on_ranks(adapter_placement: str) -> None:
    expected = restarts.trained(None, torch.optim.AdamW)
    assert sum(".past_" in name for name in expected) == 28
    for rank_tensors in run(restarts.trained, adapter_placement, torch.optim.AdamW):
        assert rank_tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(rank_tensors[name], tensor, atol=2e-4, rtol=0)


def test_a_checkpoint_of_torch_distributed_is_refused() -> None:
    model = peftcore.apply(tiny.llama(), "relora")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(peftcore.PeftcoreError, match=r"adapters of relora grow in training.*peftcore\.save"):
        peftcore.distributed.TrainingState(model, optimizer)
