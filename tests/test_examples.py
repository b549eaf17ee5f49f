"""The example scripts run as they are, each in under 40 lines, and write an adapter that loads.

`make test` runs them in forks of a process that has imported transformers, `make test-all` by the commands in their
first lines.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from support import processes
from support.commands import SPECIAL, WORDS, save_tokenizer, write_jsonl
from support.ranks.cases import shards_integers
from support.whole_run import WHOLE

import peftcore

EXAMPLES = Path(__file__).parent.parent / "examples"
PYTHON = [sys.executable, "-W", "ignore"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RUNS = {  # how each is started, on how many ranks, and where it writes its adapter
    "own_loop": (PYTHON, 1, ""),
    "trainer": (PYTHON, 1, "adapter"),
    "sft": (PYTHON, 1, "adapter"),
    # `accelerate launch --cpu` starts several ranks by mpirun only; under torchrun its ranks find each other.
    "distributed/accelerate_ddp": (TORCHRUN, 2, "adapter"),
    "distributed/fsdp2_qlora": (TORCHRUN, 2, "adapter"),
    "distributed/torchrun_ddp": (TORCHRUN, 2, "adapter"),
}
ENGINES = {  # need a library that is not in `.venv`: `make test-engines`
    "distributed/deepspeed_zero3": ("deepspeed", TORCHRUN),
    "distributed/lightning_ddp": ("lightning", PYTHON),
    "distributed/ray_train": ("ray", PYTHON),
}
ON_CPUS = {
    "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # workers import PyTorch and transformers, on a busy machine
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(SPECIAL + WORDS), **sizes, **special)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


EXAMPLES_RUN = [pytest.param(name, marks=shards_integers) if name.endswith("qlora") else name for name in RUNS]


@pytest.mark.parametrize("name", EXAMPLES_RUN)
def test_example(name: str, base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    launcher, ranks, place = RUNS[name]
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": f"the film is {word} and {word}"} for word in WORDS])
    script = [str(EXAMPLES / f"{name}.py"), str(base), str(data), str(tmp_path / "out")]
    if WHOLE:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        command = [*launcher, *script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        processes.run(processes.run_script, *script, ranks=ranks, joined=False)
    model = AutoModelForCausalLM.from_pretrained(base)
    if name == "distributed/fsdp2_qlora":
        peftcore.quantize(model)
        assert (tmp_path / "out" / "state" / ".metadata").exists()
    loaded = peftcore.load(model, tmp_path / "out" / place)
    learned = [p for n, p in peftcore.engine.adapter_parameters(loaded, "default") if "lora_B" in n]
    assert learned and all(p.abs().max() > 0 for p in learned)


@pytest.mark.parametrize("name", list(ENGINES))
def test_example_of_an_engine(name: str, base: Path, tmp_path: Path) -> None:
    """It trains, and started again it has nothing left to do."""
    from transformers import AutoModelForCausalLM

    library, launcher = ENGINES[name]
    pytest.importorskip(library)
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": f"the film is {word} and {word}"} for word in WORDS])
    command = [*launcher, str(EXAMPLES / f"{name}.py"), str(base), str(data), str(tmp_path / "out")]
    environment = {**os.environ, **ON_CPUS}
    found = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        loaded = peftcore.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out" / "adapter")
        found.append(dict(peftcore.engine.adapter_parameters(loaded, "default")))
    assert all(p.abs().max() > 0 for n, p in found[0].items() if "lora_B" in n)
    assert all(torch.equal(found[1][n], p) for n, p in found[0].items())


def test_example_of_an_engine_that_replaces_a_killed_worker(base: Path, tmp_path: Path) -> None:
    """Ray starts both workers again, which continue from the newest checkpoint as if nothing had happened."""
    from transformers import AutoModelForCausalLM

    pytest.importorskip("ray")
    texts = [{"text": f"the film is {word} and {other}"} for word in WORDS for other in WORDS[:2]]
    data = write_jsonl(tmp_path / "data.jsonl", texts)
    found = {}
    for name in ("whole", "killed"):
        out = tmp_path / name
        command = [*PYTHON, str(EXAMPLES / "distributed/ray_train.py"), str(base), str(data), str(out)]
        with (tmp_path / "log").open("w") as log:
            started = psutil.Popen(command, stdout=log, stderr=log, env={**os.environ, **ON_CPUS}, cwd=tmp_path)
        until = time.monotonic() + 600
        try:
            while name == "killed" and not list(out.glob("state/checkpoint_*/.metadata")):
                assert time.monotonic() < until and started.is_running(), (tmp_path / "log").read_text()
                time.sleep(0.01)
            if name == "killed":
                workers = [each for each in started.children(recursive=True) if "RayTrainWorker" in each.name()]
                workers[-1].kill()
            assert started.wait(600) == 0, (tmp_path / "log").read_text()
        finally:
            for each in [*started.children(recursive=True), started] if started.is_running() else ():
                each.kill()
        loaded = peftcore.load(AutoModelForCausalLM.from_pretrained(base), out / "adapter")
        found[name] = dict(peftcore.engine.adapter_parameters(loaded, "default"))
    assert "died" in (tmp_path / "log").read_text()
    assert all(torch.equal(found["killed"][name], p) for name, p in found["whole"].items())


def test_jobs_of_clusters_call_the_command_as_it_is() -> None:
    """Their command lines start torchrun with options of `peftcore train`; no cluster is asked."""
    import yaml
    from peftcore_cli import settings
    from torch.distributed.run import parse_args

    sky, kubernetes = (EXAMPLES / "distributed" / f"{name}.yaml" for name in ("skypilot", "kubernetes"))
    calls = [yaml.safe_load(sky.read_text())["run"]]
    _, job = yaml.safe_load_all(kubernetes.read_text())
    calls += job["spec"]["template"]["spec"]["containers"][0]["args"]
    own = {"--model", "--data", "--method", "--output", "--resume"}
    own |= {f"--{name.replace('_', '-')}" for name in settings.RunOptions.__dataclass_fields__}
    for call in calls:
        for name in ("NUM_NODES", "NODE_RANK", "NUM_GPUS_PER_NODE"):
            call = call.replace(f"$SKYPILOT_{name}", "1")
        call = call.removeprefix("mkdir -p /results/run && ")  # --resume continues a run, or begins in an empty folder
        words = shlex.split(call.replace('$(echo "$SKYPILOT_NODE_IPS" | head -n1)', "host").replace("\\\n", " "))
        parsed = parse_args(words[1:])
        # A machine that joins late would count other restarts: see `peftcore.distributed.start`.
        assert parsed.max_restarts == 0 and parsed.module and parsed.training_script == "peftcore_cli"
        assert parsed.training_script_args[0] == "train"
        assert {word for word in parsed.training_script_args if word.startswith("--")} <= own
