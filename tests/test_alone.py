"""The engine and one method, installed without the libraries of the command line and of training."""

import os
import subprocess
import sys
from pathlib import Path

OTHERS = ("typer", "rich", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "huggingface_hub", "matplotlib")

LOOP = f"""
import sys
for name in {OTHERS}:
    sys.modules[name] = None  # an import raises ModuleNotFoundError
import torch
import peftcore

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

model = peftcore.apply(network(), "lora", r=2, target_modules=["0", "2"])
x, y = torch.randn(32, 6), torch.randn(32, 2)
optimizer = torch.optim.AdamW(peftcore.parameter_groups(model, lr=0.05))
losses = []
for _ in range(30):
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < 0.9 * losses[0], losses
folder = peftcore.save(model, sys.argv[1])
loaded = peftcore.load(network(), folder)
assert torch.equal(loaded(x), model(x))
info = peftcore.inspect(folder)
assert (info.method, info.problem) == ("lora", None)
assert torch.allclose(peftcore.merge(model)(x), loaded(x), atol=1e-5)
print(peftcore.summary(loaded))
"""


def test_apply_train_save_and_load(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", LOOP, str(tmp_path / "adapter")]
    alone = {**os.environ, "PEFTCORE_PLUGINS": "lora"}  # as if no other package were installed
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr[-1500:]
    assert "lora, active, 2 modules" in done.stdout
