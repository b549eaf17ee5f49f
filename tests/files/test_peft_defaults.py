"""PEFT's defaults, as the installed PEFT has them."""

import peft
import pytest
from support import peft_defaults, tiny

import peftcore
from peftcore.plugin import StateRules
from peftcore.plugin.peft_fields import DEFAULTS, config_of_fields, defaults, peft_version, says_something


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
