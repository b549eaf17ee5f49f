"""What a process does first with peftcore, after a plan, or under a meta device, gives what it always gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import first_calls

# transformers itself refuses to load a model there, and says so.
NO_LOADING = {
    "FourBitConfig": "RuntimeError: You are using `from_pretrained`",
    "quantization.load": "under torch.device",
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, list[float] | str]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", first_calls.__file__],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.nightly
@pytest.mark.parametrize("function", first_calls.FUNCTIONS)
@pytest.mark.parametrize("surroundings", [s for s in first_calls.SURROUNDINGS if s != "plain"])
def test_the_answer_is_the_same(outcomes, function: str, surroundings: str) -> None:
    found = outcomes[function][surroundings]
    assert isinstance(outcomes[function]["plain"], list), outcomes[function]["plain"]
    if surroundings == "meta" and function in NO_LOADING:
        assert NO_LOADING[function] in found
    else:
        assert found == outcomes[function]["plain"]


IMPORTS = """
import contextlib, os, torch
from torch._subclasses.fake_tensor import FakeTensorMode

@contextlib.contextmanager
def default(dtype):
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)

def tables(mode):
    with mode:
        import peftcore.ops
    for table in (peftcore.ops.NF4, peftcore.ops.FP4, peftcore.ops.DYNAMIC8, peftcore.ops.dynamic8.UNSIGNED_MAP):
        assert (table.dtype, table.device.type, type(table)) == (torch.float32, "cpu", torch.Tensor), table
        assert not table.is_inference()
    torch.linspace(-1, 1, 64, requires_grad=True)
    print(peftcore.ops.DYNAMIC8.double().sum().item(), *peftcore.ops.NF4.tolist(), flush=True)

for mode in (
    contextlib.nullcontext(), torch.device("meta"), torch.inference_mode(), FakeTensorMode(), default(torch.float64)
):
    if os.fork() == 0:  # which has imported PyTorch, and of peftcore nothing
        tables(mode)
        os._exit(0)
    assert os.wait()[1] == 0, mode
"""


def test_tables_are_ordinary_tensors_whatever_mode_they_are_imported_under() -> None:
    command = [sys.executable, "-W", "error", "-c", IMPORTS]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-1500:]
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and len(set(lines)) == 1
