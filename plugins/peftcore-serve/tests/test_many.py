"""A hundred adapters behind one port, adapters of every method, and the command as a process."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from peftcore_cli.bases.adapter_folders import AdapterTask, Quantization
from peftcore_serve import command, folders
from starlette.testclient import TestClient

import peftcore
from peftcore import PeftcoreError

from .conftest import PROMPTS, save_adapter, written

COUNT = 100
# Fields without which a method does not fit the tiny base.
FIELDS: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 10, "tinit": 1, "tfinal": 1},
    "adaption-prompt": {"adapter_len": 4, "adapter_layers": 2},
    "alora": {"alora_invocation_tokens": [5]},
    "bitfit": {"add_missing": True},
    "miss": {"r": 4},
    "road": {"group_size": 8},
    "shira": {"r": 4},
    "trainable-tokens": {"token_indices": [5, 6, 7]},
    "vblora": {"vector_length": 8},
    "waveft": {"n_frequency": 100},
}
OF_OTHERS = {"adapter-fusion", "arrow"}  # they use adapters of other folders
ALONE = {
    "adaption-prompt", "alora", "cartridge", "cpt", "lily", "multitask-prompt-tuning", "p-tuning", "prefix-tuning",
    "prompt-tuning", "reft",
}  # fmt: skip


@pytest.mark.nightly
def test_a_hundred_adapters_behind_one_port(llama: Path, tmp_path: Path) -> None:
    for number in range(COUNT):
        fields = {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [number % 2]}
        save_adapter(llama, tmp_path / f"user{number}", "lora", number, **fields)
    listening = command.listen("127.0.0.1", 0)
    server = command.make(str(llama), tmp_path, limit=40, batch_size=16)
    runs = uvicorn.Server(command.uvicorn_config(server))
    thread = threading.Thread(target=runs.run, args=([listening],))
    thread.start()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}/v1", api_key="none", timeout=120)

    def ask(number: int) -> str:
        prompt = PROMPTS[number % len(PROMPTS)]
        actual = client.completions.create(model=f"user{number}", prompt=prompt, max_tokens=6, temperature=0)
        return actual.choices[0].text

    try:
        assert len(list(client.models.list())) == COUNT + 1
        with ThreadPoolExecutor(COUNT) as pool:
            actual = list(pool.map(ask, range(COUNT)))
    finally:
        client.close()
        runs.should_exit = True
        thread.join()
    assert len(server.scheduler.adapters.by_name) <= 40
    assert server.scheduler.steps < COUNT * 6 / 3
    expected = [written(llama, tmp_path / f"user{n}", PROMPTS[n % len(PROMPTS)], 6) for n in range(COUNT)]
    assert actual == expected and len(set(expected)) > 30


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::UserWarning")  # of fields that are adjusted to the tiny base
def test_adapters_of_every_method_in_one_batch(llama: Path, tmp_path: Path) -> None:
    names = [name for name in peftcore.methods() if name not in OF_OTHERS]
    for seed, name in enumerate(names):
        save_adapter(llama, tmp_path / name, name, seed, **FIELDS.get(name, {}))
    server = command.make(str(llama), tmp_path, limit=len(names), batch_size=len(names))
    requested = [(name, PROMPTS[number % len(PROMPTS)]) for number, name in enumerate(names)]
    with TestClient(server.app) as client, ThreadPoolExecutor(len(names)) as pool:

        def ask(each: tuple[str, str]) -> Any:
            body = {"model": each[0], "prompt": each[1], "max_tokens": 8, "temperature": 0}
            return client.post("/v1/completions", json=body).json()

        actual = dict(zip(names, pool.map(ask, requested), strict=True))
    assert {name: answer["error"] for name, answer in actual.items() if "error" in answer} == {}
    expected = {name: written(llama, tmp_path / name, prompt) for name, prompt in requested}
    assert {name: answer["choices"][0]["text"] for name, answer in actual.items()} == expected
    assert {name for name, loaded in server.scheduler.adapters.by_name.items() if not loaded.by_sample} == ALONE


@pytest.fixture
def process(llama: Path, saved: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command with a base that knows no end, so that an answer has all its tokens."""
    endless = shutil.copytree(llama, tmp_path / "endless")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        fields = json.loads((endless / name).read_text())
        kept = {key: value for key, value in fields.items() if not key.startswith("eos_token")}
        (endless / name).write_text(json.dumps(kept | ({"eos_token_id": None} if name == "config.json" else {})))
    words = [sys.executable, "-m", "peftcore_cli", "serve", "-m", str(endless), "--adapters", str(saved), "--port", "0"]
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, preexec_fn=listen) as running:
        yield running
        running.kill()


@pytest.mark.nightly
@pytest.mark.parametrize("busy", [False, True])
def test_the_command_ends_cleanly(process: subprocess.Popen[str], busy: bool) -> None:
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith("loading ")
    line = process.stdout.readline()
    assert line.startswith("endless and 7 adapters at http://127.0.0.1:"), line
    with openai.OpenAI(base_url=line.split()[-1], api_key="none", max_retries=0, timeout=30) as client:
        if busy:
            pieces = client.completions.create(model="one", prompt="a", max_tokens=2000, n=4, stream=True)
            next(iter(pieces))
            process.send_signal(signal.SIGINT)
            with pytest.raises(openai.APIError, match="the server is shutting down"):
                list(pieces)
        else:
            assert client.completions.create(model="one", prompt="a", max_tokens=2).choices[0].text
            process.send_signal(signal.SIGTERM)
    assert process.wait(20) == (130 if busy else -signal.SIGTERM)
    assert process.stderr.read() == ""


def test_options_that_do_not_fit(llama: Path, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(
        PeftcoreError, match=r"is an adapter, not a folder of adapters. Pass the folder that contains it"
    ):
        command.make(str(llama), saved / "one")
    with pytest.raises(PeftcoreError, match=r"cannot read the folder of adapters '.*/none': No such file"):
        command.make(str(llama), tmp_path / "none")
    taken = command.listen("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    with taken, pytest.raises(PeftcoreError, match=rf"cannot listen on 127.0.0.1:{port}: .* Pass another --port"):
        command.listen("127.0.0.1", port)
    with pytest.raises(PeftcoreError, match=r"--host 'no.such.host.invalid' is not an address of this machine"):
        command.listen("no.such.host.invalid", 0)


def test_fields_of_the_generation_config_that_are_not_applied(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": 2, "repetition_penalty": 1.3}')
    server = command.make(str(base))
    server.scheduler.close()
    assert (
        "the server ignores these fields of the base's generation config: repetition_penalty=1.3"
        in capsys.readouterr().err
    )


def test_the_base_is_quantized_as_the_adapters_record(llama: Path, tmp_path: Path) -> None:
    recorded = AdapterTask("causal-lm", 64, quantized=Quantization("nf4", skip=("down_proj",)))
    for name in ("one", "two"):
        save_adapter(llama, tmp_path / name, "lora", 0, r=4)
        recorded.write(tmp_path / name)
    server = command.make(str(llama), tmp_path)
    server.scheduler.close()
    layers: Any = server.scheduler.adapters.model.get_submodule("model.layers.0.mlp")
    assert layers.up_proj.quant_type == "nf4" and layers.down_proj.weight.is_floating_point()
    server.texts.for_adapter(folders.find_one(tmp_path, "two"))
    AdapterTask("causal-lm", 64).write(tmp_path / "two")
    late = r"'two' was trained on a base without a record .* in memory is quantized as nf4.*--quantize none"
    with pytest.raises(PeftcoreError, match=late):  # changed while the server runs
        server.texts.for_adapter(folders.find_one(tmp_path, "two"))
    with pytest.raises(PeftcoreError, match=r"'one' was trained on a base quantized as nf4 .* 'two' on a base without"):
        command.make(str(llama), tmp_path)
