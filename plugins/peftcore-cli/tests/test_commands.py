"""The commands that look at the installation, those of plugins, and how a missing library reads."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from peftcore_cli import app as application, console
from support import fresh_process, tiny
from support.commands import Run
from support.mixtures import mixture
from transformers import AutoModelForCausalLM

import peftcore
from peftcore.plugin import Command, hookimpl
from peftcore.plugin.discovery import Plugin
from peftcore.plugin.registry import registry


def test_plugins_show_what_is_broken(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Plugin("limp", "peftcore-limp", "0.3", error="ImportError: no leg")
    monkeypatch.setitem(registry._plugins or (registry.methods() and registry._plugins), "limp", broken)
    output = run("plugins").output
    assert "lora" in output and "peftcore_methods" in output and "works" in output
    assert "peftcore-limp" in output and "0.3" in output and "broken: ImportError: no leg" in output.replace("\n", " ")


def test_plugins_survives_a_broken_one_in_strict_mode(tmp_path: Path) -> None:
    """A plugin that raises on import, really installed: `plugins` lists it, and asking for it is an error."""
    (tmp_path / "peftcore_limp.py").write_text("raise RuntimeError('no leg')\n")
    info = tmp_path / "peftcore_limp-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peftcore-limp\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[peftcore]\nlimp = peftcore_limp\n")
    listed = command("plugins", path=tmp_path, PEFTCORE_STRICT_PLUGINS="1", COLUMNS="200")
    assert listed.returncode == 0, listed.stderr
    assert "broken: RuntimeError: no leg" in listed.stdout and "peftcore-lora" in listed.stdout
    asked = command("methods", "limp", path=tmp_path)
    assert asked.returncode == 1 and "the plugin 'limp' (peftcore-limp 0.3) is broken" in asked.stderr


def test_methods(run: Run) -> None:
    output = " ".join(run("methods").output.split())
    assert "LoRA (Hu et al. 2021, arXiv 2106.09685)" in output  # the plugin's docstring, not its config's
    fields = run("methods", "lora").output
    assert "rank_pattern" in fields and "'none', 'all' or 'lora_only'" in fields.replace("\n", " ")
    assert "no PEFT method 'lorra' is installed" in run("methods", "lorra", code=1).output


def test_methods_for_a_model(run: Run, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    lines = {line.split()[0]: line for line in run("methods", "--for", str(llama)).output.splitlines()}
    trained = peftcore.plan(AutoModelForCausalLM.from_pretrained(llama), "lora")
    assert f"{trained.trainable_parameters:,}" in lines["lora"]
    assert "lacks biases to train" in lines["bitfit"] and lines["bitfit"].split()[1] == "-"
    both = run("methods", "lora", "--for", str(llama), code=1).output
    assert "--for tries every method. Remove 'lora'" in both


def test_doctor(run: Run) -> None:
    import torch

    output = run("doctor").output
    assert torch.__version__ in output and "extension" in output and "lora" in output
    assert "experts" in output and "fused" in output


def test_doctor_names_the_kernels_that_this_machine_cannot_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftcore.ops import build_info

    old = build_info.BuildInfo(
        True,
        cpu_level="avx2",
        cpu_levels=("portable", "avx2"),
        compiled_cpu_levels=("portable", "avx2", "avx512", "avx512bf16", "amx"),
        caches=(32 << 10, 1 << 20, 32 << 20),
    )
    monkeypatch.setattr(build_info, "build_info", lambda: old)
    output = run("doctor").output
    assert re.search(r"unavailable kernels +avx512, avx512bf16, amx\b", output), output
    assert "32 KiB, 1,024 KiB, 32,768 KiB" in output


def test_doctor_says_what_is_missing_and_what_it_costs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftcore.ops import build_info

    gone = build_info.BuildInfo(False, "no C++ compiler", costs=("operators are slow",))
    monkeypatch.setattr(build_info, "build_info", lambda: gone)
    monkeypatch.setitem(sys.modules, "gguf", None)
    output = run("doctor").output
    assert "missing: no C++ compiler" in output and "costs: operators are slow" in output
    assert (
        "'gguf' is not installed, but is required for .gguf files as base models. Install it: pip install gguf"
        in output
    )
    assert "pip install --no-build-isolation" in output


def test_plan_loads_no_weights(run: Run, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text((llama / "config.json").read_text())
    output = run(
        "plan", "-m", tmp_path / "shape", "--method", "lora", "--set", "target_modules=q_proj", "--full"
    ).output
    assert "trainable: 1,024 of" in output and "q_proj: 2 modules" in output  # 2 · 8 · (32 + 32)
    assert "model.layers.1.self_attn.q_proj" in output
    head = run("plan", "-m", tmp_path / "shape", "--method", "lora", "--labels", "a,b,c").output
    assert "trained parameter" in head


def test_info_without_the_method(run: Run, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "SOMETHING_NEW", "depth": 3}))
    told = {"peftcore_fields": '{"width_of_its_own": 7}', "peftcore_method": "something-new"}
    save_file({"a": torch.zeros(3, 4)}, tmp_path / "adapter_model.safetensors", told)
    output = run("info", tmp_path).output.replace("\n", " ")
    assert "SOMETHING_NEW" in output and "depth" in output and "12" in output and "width_of_its_own" in output
    assert "no installed method reads peft_type 'SOMETHING_NEW'" in " ".join(output.split())
    assert "peftcore-something-new" not in output  # a stranger's file must not name what is installed
    assert "nothing' does not exist" in run("info", tmp_path / "nothing", code=1).output


def test_info_of_a_config_that_no_load_takes(run: Run, tmp_path: Path) -> None:
    saved, other = peftcore.save(peftcore.apply(mixture("qwen3_moe"), "lora", r=8), tmp_path / "saved"), tmp_path / "a"
    assert "cannot be loaded" not in run("info", saved).output
    tiny.without_hash(saved)
    fields = json.loads((saved / "adapter_config.json").read_text())
    for wrong, message in (({"r": "two"}, "r must be a whole number, found 'two'"), ({"magic": 7}, "uses magic=7")):
        (saved / "adapter_config.json").write_text(json.dumps({**fields, **wrong}))
        shown = " ".join(run("info", saved).output.split())
        assert "cannot be loaded" in shown and message in shown
    # What another library wrote, and folders without an adapter, have the errors of `load`.
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "num_layers": 4}))
    (other / "adapters.safetensors").write_bytes(b"")
    assert "adapter_model.safetensors is missing; it contains adapter_config.json, adapters.safetensors" in " ".join(
        run("info", other, code=1).output.split()
    )
    (saved / "adapter_model.safetensors").rename(other / "adapter_model.safetensors")
    assert "has no field peft_type (its fields: fine_tune_type, num_layers)" in run("info", other, code=1).output
    (saved / "adapter_config.json").rename(saved / "config.json")
    assert "this is the folder of a base model" in run("info", saved, code=1).output
    (saved / "config.json").rename(saved / "run.json")
    assert "the run in" in run("info", saved, code=1).output


def test_info_of_experts(run: Run, tmp_path: Path) -> None:
    peftcore.save(peftcore.apply(mixture("qwen3_moe", num_experts=6), "lora", r=8, expert_r=2), tmp_path)
    held = 2 * 6 * 2 * ((64 + 64) + (32 + 64))  # modules, experts, r, (in + out) of both weights
    output = run("info", tmp_path).output
    assert "2 modules of 6 experts" in output and f"{held:,} of the parameters" in output
    tiny.without_hash(tmp_path)
    for found in ({"r": "?"}, {"r": 0}, {"target_parameters": [7, "lora"]}, {"target_parameters": 3}):
        fields = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "rank_pattern": {}, **found}))
        run("info", tmp_path)


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """Options of the command below."""

    times: Annotated[int, typer.Option(min=1, help="Number of greetings.")] = 1


def greet(name: str, *, given: Greeting) -> None:
    """Say hello."""
    if name == "nobody":
        raise peftcore.PeftcoreError("nobody cannot be greeted. Pass a name")
    print(f"hello {name} " * given.times)


class Adds:
    """A plugin with one command."""

    def __init__(self, name: str, function: Any = greet) -> None:
        self.command = Command(name, function, ["peftcore greet you --times 2"])

    @hookimpl
    def peftcore_commands(self) -> list[Command]:
        return [self.command]


@pytest.fixture
def register() -> Iterator[Callable[[str, Any], None]]:
    names: list[str] = []

    def call(name: str, plugin: Any) -> None:
        registry.register(name, plugin, f"peftcore-{name}", "2.0")
        names.append(name)

    yield call
    for name in names:
        registry.unregister(name)


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["greet", "you", "--times", "2"], 0, "hello you hello you"),
        (["--help"], 0, "Say hello."),
        (["greet", "--help"], 0, "peftcore greet you --times 2"),
        (["greet", "nobody"], 1, "error: nobody cannot be greeted. Pass a name"),
    ],
)
def test_a_plugin_adds_a_command(
    register: Any, capsys: pytest.CaptureFixture[str], words: list[str], code: int, expected: str
) -> None:
    register("greeter", Adds("greet"))
    with pytest.raises(SystemExit) as end:
        application.run(words)
    shown = capsys.readouterr()
    assert (end.value.code, expected in shown.out + shown.err) == (code, True)


@pytest.mark.parametrize(("taken", "other"), [("train", "peftcore"), ("greet", "the plugin 'first'")])
def test_two_commands_with_the_same_name(register: Any, taken: str, other: str) -> None:
    register("first", Adds("greet"))
    register("second", Adds(taken))
    match = rf"the plugin 'second' \(peftcore-second 2.0\) and {other}.* both provide '{taken}'. Rename one"
    with pytest.raises(SystemExit, match=match):
        application.run(["--help"])
    application.build(["train", "--help"])  # commands of the core work


def test_a_plugin_whose_commands_fail_is_left_out(register: Any, run: Run) -> None:
    class Fails:
        @hookimpl
        def peftcore_commands(self) -> list[Command]:
            raise ImportError("no module named 'fire'")

    register("fails", Fails())
    register("greeter", Adds("greet"))
    with pytest.warns(UserWarning, match=r"plugin 'fails' \(peftcore-fails 2.0\) failed: ImportError: no module"):
        assert "greet" in registry.commands()


@pytest.mark.parametrize("answer", [greet, [greet], None])
def test_commands_of_another_type_are_refused(register: Any, answer: Any) -> None:
    class Wrong:
        @hookimpl
        def peftcore_commands(self) -> Any:
            return answer

    register("wrong", Wrong())
    with pytest.raises(peftcore.PluginError, match=r"'wrong' \(.*must return a list of peftcore.plugin.Command, found"):
        registry.commands()


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (
            "plugin_discovery.entry_points = lambda group: []",
            "peftcore: error: 'peftcore compare' is in a package that is not installed. "
            "Run in a copy of peftcore's repository: pip install ./plugins/peftcore-compare",
        ),
        (
            "import os; os.environ['PEFTCORE_PLUGINS'] = 'none'",
            "peftcore: error: 'peftcore compare' cannot run, because the package peftcore-compare 0.1.0 is broken: "
            "it is disabled by PEFTCORE_PLUGINS=none",
        ),
    ],
)
def test_a_command_in_a_package_that_is_missing(before: str, message: str) -> None:
    code = f"from peftcore.plugin import discovery as plugin_discovery; {before}\n"
    code += "from peftcore_cli.app import run; run(['compare', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (1, message)


def test_help_needs_no_torch(tmp_path: Path) -> None:
    """Not even with an installed package that adds a command."""
    (tmp_path / "peftcore_hello.py").write_text(
        'from peftcore.plugin import Command, hookimpl\n\npeftcore_api = ">=3.0,<4"\n\n\ndef hello() -> None:\n'
        '    """Say hello."""\n\n\n@hookimpl\ndef peftcore_commands():\n    return [Command("hello", hello)]\n'
    )
    info = tmp_path / "peftcore_hello-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peftcore-hello\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[peftcore]\nhello = peftcore_hello\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from peftcore_cli.app import build\n"
        "names = [each.name for each in build(['--help']).registered_commands]\n"
        "assert 'hello' in names and 'train' in names and 'peftcore_hello' in sys.modules, names\n"
        "sys.exit('torch' in sys.modules or 'peftcore_lora' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_no_plugin_is_imported_for_a_command_of_the_core() -> None:
    code = (
        "import sys; from peftcore_cli.app import build; from peftcore.plugin import discovery as plugin_discovery\n"
        "plugin_discovery.entry_points = None\nbuild(['train', '--help'])"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_version(run: Run) -> None:
    import torch

    lines = run("--version").output.splitlines()
    assert lines[:2] == [f"peftcore {version('peftcore')}", f"torch {torch.__version__}"]
    assert lines[2].startswith("transformers 5.") and lines[3].startswith("extension ")


@pytest.mark.parametrize("name", registry.commands())
def test_examples_of_help_are_understood(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one of this command, whose options exist and take what it gives them; nothing is run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / "run.toml").write_text('data = "chat.jsonl"')  # one of them resumes this run
    examples = registry.commands(name)[name].examples
    group: Any = typer.main.get_command(application.build([name]))
    command = group.commands[name]
    assert examples and "Examples:" in command.epilog
    for example in examples:
        program, *words = shlex.split(example)
        assert (program, words[0]) == ("peftcore", name)
        command.make_context(name, words[1:])


def test_what_libraries_will_change_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    application.show_warning(FutureWarning("`old` is deprecated"), FutureWarning, "modeling_utils.py", 1)
    application.show_warning(UserWarning("rows are cut"), UserWarning, "rows.py", 1)
    assert capsys.readouterr().err == "warning: rows are cut\n"


def test_a_title_longer_than_its_table_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.table([("down", 6)], ("", "up"), title="labels (down), answers (across)")
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "labels (down), answers (across)",
        "      up",
        "down  6",
    ]
    assert [console.number(n, "row") for n in (0, 1, 1000)] == ["0 rows", "1 row", "1,000 rows"]


def test_an_unknown_command(run: Run) -> None:
    assert "No such command 'trian'" in run("trian", code=2).output


def test_without_typer_the_command_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('No module named typer', name='typer')\n")
    done = command("--help", path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == "peftcore: the command line needs 'typer'. Install it: pip install typer"


def test_without_transformers_train_says_what_to_install(
    run: Run, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.trainer  # noqa: F401  # imports accelerate, whose metadata transformers has seen

    monkeypatch.setitem(sys.modules, "accelerate", None)
    error = run("train", "-m", "x", "-d", reviews, "-o", tmp_path / "run", code=1).output
    assert "'accelerate' is required but not installed. Install it: pip install accelerate" in error


def test_which_method_must_be_said_where_there_are_several(run: Run, llama: Path, toys: None) -> None:
    error = run("plan", "-m", llama, code=1).output
    assert "Pass --method NAME (installed: " in error and "around" in error


def command(*arguments: str, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `peftcore` in a process of its own, with `path` before the installed packages."""
    code = f"import sys; sys.path.insert(0, {str(path)!r}); from peftcore_cli import main; main()"
    return fresh_process.run(code, *arguments, **{"COLUMNS": "160", **environment})
