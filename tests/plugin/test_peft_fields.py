"""Which of several methods of one peft_type reads a file, and PEFT's defaults, as the installed PEFT has them."""

import json
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from support import peft_defaults, tiny

import peftcore
from peftcore.engine import adapter_parameters, applied
from peftcore.files.loading import restore
from peftcore.plugin import ForeignFormat, Method, PeftRules, StateRules
from peftcore.plugin.peft_fields import (
    DEFAULTS,
    config_of_fields,
    defaults,
    method_of_fields,
    peft_version,
    says_something,
)


def same(name: str, flag: str | None = None, **rules: object) -> Method:
    return tiny.method(name, state=StateRules("SAME", peft=PeftRules(flag), **rules))


def read_by(**fields: object) -> str:
    return method_of_fields("'the file'", {"peft_type": "SAME", **fields}).name


@pytest.mark.parametrize("names", [("aa", "bb"), ("bb", "aa")], ids="-".join)
def test_the_method_whose_flag_is_set_reads_and_the_method_without_one_any_other_file(names: tuple[str, str]) -> None:
    general, special = names
    with tiny.installed(same(general), same(special, flag="use_flag")):
        assert read_by() == general
        assert read_by(use_flag=True) == special
    with tiny.installed(same(special, flag="use_flag")):
        assert read_by(use_flag=True) == special
        with pytest.raises(
            peftcore.PluginError,
            match=r"no installed method reads 'the file', of peft_type 'SAME' with r set, because no field "
            rf"that identifies a method is set: '{special}' \(peftcore-{special} 1.0\) use_flag. Methods are ",
        ):
            read_by(r=3)


@pytest.mark.parametrize("names", [("aa", "bb"), ("bb", "aa")], ids="-".join)
def test_a_strangers_claim_leaves_a_method_whole(names: tuple[str, str], tmp_path: Path) -> None:
    """It applies, saves and loads its files, whoever else claims their peft_type; others' files are asked for."""
    mine, strangers = names
    with tiny.installed(same(mine), same(strangers)):
        for name in names:
            peftcore.save(peftcore.apply(tiny.llama(), name, value=3.0), tmp_path / name)
        for name in names:
            model = peftcore.load(tiny.llama(), tmp_path / name)
            assert applied(model, "default").method == name
            assert {p.item() for _, p in adapter_parameters(model, "default")} == {3.0}
        file = tmp_path / mine / "adapter_model.safetensors"
        safetensors.torch.save_file(safetensors.torch.load_file(file), file)  # as PEFT writes it
        tiny.without_hash(tmp_path / mine)
        with pytest.raises(
            peftcore.PluginError,
            match=r"2 installed methods can read .*adapter_config.json', of peft_type 'SAME' with .*value set: "
            r"'aa' \(peftcore-aa 1.0\), 'bb' \(peftcore-bb 1.0\). Choose one with method='NAME' "
            r"\(--method NAME on the command line\)",
        ):
            peftcore.load(tiny.llama(), tmp_path / mine)
        for spelling in (mine, mine.upper()):
            model = peftcore.load(tiny.llama(), tmp_path / mine, method=spelling)
            assert applied(model, "default").method == mine
        restore(model, tmp_path / mine)  # the method on the model is known
    with tiny.installed(same(mine)):
        assert applied(peftcore.load(tiny.llama(), tmp_path / mine), "default").method == mine


def test_two_that_match_are_named() -> None:
    with tiny.installed(same("aa", flag="use_flag"), same("bb", flag="use_flag"), same("cc")):
        assert read_by() == "cc"
        with pytest.raises(peftcore.PluginError, match=r"2 installed methods can read .*'aa' .*, 'bb' .*method='NAME'"):
            read_by(use_flag=True)


def test_the_method_that_is_named() -> None:
    def named(name: str, **fields: object) -> str:
        return method_of_fields("'f'", {"peft_type": "SAME", **fields}, method=name).name

    with tiny.installed(same("aa"), same("bb", flag="use_flag"), tiny.method("other")):
        assert named("aa", use_flag=True) == "aa"  # whose config then refuses the field
        assert named("BB", use_flag=True) == "bb"
        with pytest.raises(
            peftcore.PluginError, match="'bb' only reads files with use_flag set, found 'f', of peft_type 'SAME'"
        ):
            named("bb")
        with pytest.raises(peftcore.PluginError, match="'other' reads peft_type 'TOY_OTHER', but 'f' has 'SAME'"):
            named("other")
        with pytest.raises(peftcore.PluginError, match="no PEFT method 'nowhere' is installed"):
            named("nowhere")


def test_the_writer_reads_unless_it_declines() -> None:
    def read(written_by: str, **fields: object) -> str:
        return method_of_fields("'f'", {"peft_type": "SAME", **fields}, written_by=written_by).name

    with tiny.installed(same("aa"), same("bb", flag="use_flag"), same("cc", flag="use_flag"), tiny.method("other")):
        assert read("aa", use_flag=True) == "aa"
        assert read("cc", use_flag=True) == "cc"
        for name in ("cc", "other"):  # of which the one declines, the other has another peft_type
            with pytest.warns(UserWarning, match=rf"by the method '{name}', which does not read it. 'aa' reads it"):
                assert read(name) == "aa"
        with pytest.warns(UserWarning, match=r"'f' was written by the method 'gone', which is not installed. 'aa'"):
            assert read("gone") == "aa"


def test_one_method_reads_a_file_and_no_other_is_called(tmp_path: Path) -> None:
    """Others of the same peft_type, and formats of other libraries, are not asked about a file that names its own."""

    def fails(*_):
        raise AssertionError("it is called")

    with tiny.installed(same("bb")):
        peftcore.save(peftcore.apply(tiny.llama(), "bb", value=3.0), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file), file)  # as PEFT writes it
    tiny.without_hash(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_bb": True}))
    form = ForeignFormat("theirs", "their.safetensors", fails, fails)
    others = [same(name, flag=f"use_{name}", read=fails) for name in ("aa", "cc")]
    others += [
        same("dd", read=fails, formats=(form,)),
        tiny.method("zz", state=StateRules("Z", formats=(form,))),
    ]

    def read(_model, tensors, fields):
        return tensors, {name: value for name, value in fields.items() if name != "use_bb"}

    with tiny.installed(same("bb", flag="use_bb", read=read), *others):
        assert applied(peftcore.load(tiny.llama(), tmp_path), "default").method == "bb"


def test_two_that_read_one_foreign_format(tmp_path: Path) -> None:
    def read(model, fields, tensors):
        return peftcore.methods()[fields["kind"]].config_class(), {
            f"base_model.model.model.layers.{i}.self_attn.q_proj.gain": torch.tensor(5.0) for i in range(2)
        }

    def broken(fields):
        raise KeyError("kind")

    def foreign(name: str, matches, **more) -> Method:
        form = ForeignFormat("theirs", "their.safetensors", matches, read, **more)
        return tiny.method(name, state=StateRules(name, formats=(form,)))

    (tmp_path / "adapter_config.json").write_text(json.dumps({"kind": "zz"}))
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "their.safetensors")
    with tiny.installed(foreign("zz", lambda fields: True)):
        assert applied(peftcore.load(tiny.llama(), tmp_path), "default").method == "zz"
    with tiny.installed(foreign("aa", lambda fields: True), foreign("zz", lambda fields: True)):
        with pytest.raises(peftcore.PluginError, match=r"2 installed methods can read .*'aa' .*, 'zz' .*method='NAME'"):
            peftcore.load(tiny.llama(), tmp_path)
        assert applied(peftcore.load(tiny.llama(), tmp_path, method="zz"), "default").method == "zz"
    by_another_config = tmp_path / "other"
    by_another_config.mkdir()
    (by_another_config / "theirs.json").write_text(json.dumps({"kind": "yy"}))
    safetensors.torch.save_file({"a": torch.zeros(1)}, by_another_config / "their.safetensors")
    with tiny.installed(foreign("yy", lambda fields: True, config="theirs.json"), foreign("zz", lambda fields: True)):
        assert applied(peftcore.load(tiny.llama(), by_another_config), "default").method == "yy"
        assert applied(peftcore.load(tiny.llama(), tmp_path), "default").method == "zz"
    with (
        tiny.installed(foreign("aa", broken), foreign("zz", lambda fields: True)),
        pytest.warns(UserWarning, match=r"ForeignFormat.matches of 'theirs' of the plugin 'aa' .* failed: KeyError"),
    ):
        assert applied(peftcore.load(tiny.llama(), tmp_path), "default").method == "zz"


def test_a_file_names_the_package_that_wrote_it(tmp_path: Path) -> None:
    with tiny.installed(tiny.method("named")):
        peftcore.save(peftcore.apply(tiny.llama(), "named"), tmp_path)
    with safetensors.safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["peftcore_plugin"] == "peftcore-named 1.0"
    with pytest.raises(peftcore.PluginError, match=r"If you trust the file .*: pip install peftcore-named==1\.0$"):
        peftcore.load(tiny.llama(), tmp_path)


@pytest.mark.parametrize("plugin", [None, "- -", "--index-url=http://x 1", "a; rm 1", "a\nb 1", "a 1 2", "a"])
def test_a_package_that_no_index_takes_is_not_named(plugin: str | None) -> None:
    with pytest.raises(peftcore.PluginError) as found:
        method_of_fields("'the file'", {"peft_type": "NOBODYS"}, plugin=plugin)
    assert "pip install" not in str(found.value)


def test_the_file_is_what_the_installed_peft_says() -> None:
    if peft_version() != peft.__version__:
        pytest.skip(f"the defaults are of PEFT {peft_version()}, installed is {peft.__version__}")
    wanted = peft_defaults.as_text(peft_defaults.of_installed())
    assert DEFAULTS.read_text() == wanted, "run in tests/: python -m support.peft_defaults"


def test_what_says_something() -> None:
    assert defaults("LORA")["qalora_group_size"] == 16
    assert defaults("LORA")["megatron_core"] == "megatron.core"
    assert defaults("SOME_OTHER") == {}
    for value, says in ((True, False), (None, False), (False, True), (0, True), ([], True)):
        assert says_something("VERA", "save_projection", value) is says
    for value, says in ((0.0, False), (None, False), ([], False), (False, False), (0.1, True), (True, True)):
        assert says_something("VERA", "some_other", value) is says


def test_a_default_that_the_method_does_not_know_is_ignored() -> None:
    fields = {"peft_type": "VERA", "peft_version": "0.21.2", "save_projection": True, "d_initial": 0.1, "value": 2.0}
    method = tiny.method("knows-little", state=StateRules(peft_type="VERA"))
    assert config_of_fields("a file", method, fields).value == 2.0
    for changed in ({"d_initial": 0.2}, {"save_projection": False}, {"unheard_of": 1}):
        with pytest.raises(peftcore.CheckpointError, match=rf"a file uses {next(iter(changed))}=.* 'knows-little'"):
            config_of_fields("a file", method, {**fields, **changed})
