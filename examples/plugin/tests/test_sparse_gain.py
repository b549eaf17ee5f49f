"""Sparse gain passes the conformance suite, and keeps what its config says."""

from peftcore_sparse_gain import SparseGainConfig

import peftcore
from peftcore.plugin import FAMILIES, check_method


def test_conformance() -> None:
    check_method(SparseGainConfig())


def test_most_outputs_are_pruned() -> None:
    model = peftcore.apply(FAMILIES["Qwen2"].make(), "sparse-gain", keep=0.1)
    inputs = FAMILIES["Qwen2"].inputs(model, 2)
    for step in range(1, 5):
        (model(**inputs).logits.square().mean() + peftcore.extra_loss(model)).backward()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data -= 0.1 * parameter.grad
        peftcore.after_step(model, step, total_steps=4)
    masks = [value for name, value in model.state_dict().items() if name.endswith(".mask")]
    assert sum(mask.sum() for mask in masks) == round(0.1 * sum(mask.numel() for mask in masks))
