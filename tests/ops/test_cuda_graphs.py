"""Operators that read numbers of the host stay out of CUDA graphs, which would repeat those of their capture."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from peftcore.ops import grouped_lora_linear, lora_linear


def values(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def lora(p):
    w, x, a, b = values(8, 64).detach(), values(3, 64), values(4, 64), values(8, 4)
    return lambda x, a, b: lora_linear(x, w, None, a, b, 0.5, p), (x, a, b)


def experts(p):
    w, x, a, b = values(2, 8, 64).detach(), values(3, 64), values(2, 4, 64), values(2, 8, 4)
    ends = torch.tensor([1, 3], dtype=torch.int32)
    return lambda x, a, b: grouped_lora_linear(x, ends, w, None, a, b, scale=0.5, dropout_p=p), (x, a, b)


def in_graphs(function, inputs):
    """Return peftcore's operators in the compiled forward and backward pass, with the values that they give."""
    found = []

    def record(module, _):
        found.extend(n.target for n in module.graph.nodes if isinstance(n.target, torch._ops.OpOverload))
        return make_boxed_func(module.forward)

    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=record))
    torch.manual_seed(1)
    y = compiled(*inputs)
    results = [y, *torch.autograd.grad(y.sum(), inputs)]
    return [op for op in found if op.namespace == "peftcore"], results


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own tracing does
@pytest.mark.parametrize("made", [lora, experts])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_of_a_compiled_model(made, p):
    function, inputs = made(p)
    operators, found = in_graphs(function, inputs)
    torch.manual_seed(1)
    y = function(*inputs)
    for one, other in zip(found, [y, *torch.autograd.grad(y.sum(), inputs)], strict=True):
        torch.testing.assert_close(one, other)
    assert len(operators) == 2  # forward and backward
    for operator in operators:
        assert (torch.Tag.cudagraph_unsafe in operator.tags) == (p > 0), operator


def test_tags_of_all_operators():
    """A seed or a step is the host's; without one an operator may be in a graph."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("peftcore::")]
    unsafe, seeded = set(), set()
    for schema in schemas:
        name = schema.name.removeprefix("peftcore::")
        operator = getattr(getattr(torch.ops.peftcore, name), schema.overload_name or "default")
        if torch.Tag.cudagraph_unsafe in operator.tags:
            unsafe.add(name)
        if any(argument.name == "seed" for argument in schema.arguments):
            seeded.add(f"{name.removesuffix('_seeded')}_seeded")
    assert {"lora_linear_seeded", "grouped_linear_backward_seeded"} <= seeded
    assert unsafe == seeded | {"optim_step_", "optim_step_paged_"}
