"""Plugins: found one by one, refused with their names, and the rest goes on."""

import dataclasses
import inspect
import re
import types

import pytest
import torch
from support import tiny
from support.entry_points import entry

import peftcore
from peftcore.plugin import (
    Architecture,
    Method,
    StateRules,
    WeightFormat,
    checks as plugin_checks,
    discovery as plugin_discovery,
    hookimpl,
    peft_fields,
)
from peftcore.plugin.checks import ARGUMENTS_OF_APPLY


def test_finds_methods_by_entry_point(discover) -> None:
    registry = discover(("scale", tiny.Plugin(tiny.method("scale")), "peftcore-scale"))
    assert list(registry.methods()) == ["scale"]
    (plugin,) = registry.plugins()
    assert (plugin.name, plugin.distribution, plugin.version) == ("scale", "peftcore-scale", "1.0")
    assert plugin.hooks == ["peftcore_methods"]


def test_a_broken_plugin_is_a_warning_and_an_error_when_asked_for(discover) -> None:
    registry = discover(
        ("scale", tiny.Plugin(tiny.method("scale")), "peftcore-scale"), ("broken", None, "peftcore-broken")
    )
    with pytest.warns(UserWarning, match=r"plugin 'broken' \(peftcore-broken 1.0\) cannot be used: AttributeError"):
        assert list(registry.methods()) == ["scale"]
    with pytest.raises(peftcore.PluginError, match=r"'broken' \(peftcore-broken 1.0\) is broken: AttributeError"):
        registry.method("broken")


def test_a_broken_plugin_hides_no_other_where_warnings_are_errors(discover) -> None:
    registry = discover(
        ("broken", None, "peftcore-broken"), ("scale", tiny.Plugin(tiny.method("scale")), "peftcore-scale")
    )
    with pytest.raises(UserWarning, match="plugin 'broken'"):  # as pytest is configured here
        registry.methods()
    assert list(registry.methods()) == ["scale"]


def test_strict_makes_it_an_error(discover, monkeypatch) -> None:
    monkeypatch.setenv("PEFTCORE_STRICT_PLUGINS", "1")
    with pytest.raises(peftcore.PluginError, match="'broken'"):
        discover(("broken", None, "peftcore-broken")).methods()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_second_distribution_of_one_name_does_not_disable_the_first(discover, order) -> None:
    """The distribution with the documented name, `peftcore-<name>`, is used, wherever it is found."""
    own, other = tiny.method("scale"), tiny.method("scale")
    entries = [("scale", tiny.Plugin(own), "peftcore-scale"), ("scale", tiny.Plugin(other), "scale")]
    registry = discover(*(entries[index] for index in order))
    with pytest.warns(
        UserWarning, match=r"peftcore-scale 1.0 is used, and scale 1.0 is ignored. Uninstall all but one"
    ):
        assert registry.method("scale") is own
    (plugin,) = registry.plugins()
    assert (plugin.distribution, plugin.error) == ("peftcore-scale", None)


def test_of_two_distributions_with_other_names_the_first_found_is_used(discover) -> None:
    first, second = tiny.method("scale"), tiny.method("scale")
    registry = discover(("scale", tiny.Plugin(first), "one"), ("scale", tiny.Plugin(second), "another"))
    with pytest.warns(UserWarning, match=r"one 1.0 is used, and another 1.0 is ignored"):
        assert registry.method("scale") is first


@pytest.mark.parametrize("names", [("one", "two"), ("two", "one")])
def test_two_of_one_peft_type_are_both_usable(discover, names) -> None:
    state = StateRules(peft_type="SAME")
    plugins = [(name, tiny.Plugin(tiny.method(name, state=state)), f"peftcore-{name}") for name in names]
    assert list(discover(*plugins).methods()) == ["one", "two"]
    for plugin in plugins:
        assert list(discover(plugin).methods()) == [plugin[0]]


@pytest.mark.parametrize("spelling", ["my-method", "my_method", "MY_METHOD", "My.Method", "my--method"])
def test_names_are_compared_as_those_of_packages(discover, monkeypatch, spelling: str) -> None:
    plugin = ("my-method", tiny.Plugin(tiny.method("my-method")), "peftcore-my-method")
    assert discover(plugin).method(spelling).name == "my-method"
    monkeypatch.setenv("PEFTCORE_PLUGINS", spelling)
    assert list(discover(plugin).methods()) == ["my-method"]
    registry = discover((spelling, *plugin[1:]))  # an entry point of another spelling than its method's
    assert list(registry.methods()) == ["my-method"]
    with pytest.raises(peftcore.PluginError, match=rf"'{spelling}' is already registered by peftcore-my-method"):
        registry.register("MY.method", plugin[1])
    registry.unregister("my_METHOD")
    assert registry.methods() == {}


def test_names_that_compare_equal_are_one_name(discover) -> None:
    plugin = tiny.Plugin(tiny.method("my-method"))
    registry = discover(("my-method", plugin, "peftcore-my"), ("My_Method", plugin, "other"))
    told = (
        r"provide the peftcore plugin 'my-method': peftcore-my 1.0 is used, and other 1.0 \(as 'My_Method'\) is ignored"
    )
    with pytest.warns(UserWarning, match=told):
        assert list(registry.methods()) == ["my-method"]


def test_a_misspelt_hook_shows_the_nearest(discover) -> None:
    class Misspelt:
        @hookimpl
        def peftcore_method(self):
            return []

    registry = discover(("misspelt", Misspelt(), "peftcore-misspelt"))
    with pytest.warns(UserWarning, match=r"'peftcore_method' is not a hook of peftcore \(nearest: 'peftcore_methods'"):
        registry.methods()


def test_a_hook_with_a_wrong_argument_is_broken(discover) -> None:
    class Wrong:
        @hookimpl
        def peftcore_architecture(self, modell):
            return None

    with pytest.warns(UserWarning, match="modell"):
        discover(("wrong", Wrong(), "peftcore-wrong")).methods()


class Answers:
    """A plugin whose `peftcore_methods` answers what it was given."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    @hookimpl
    def peftcore_methods(self):
        return self.answer


def test_arguments_of_apply_are_those_of_its_signature() -> None:
    parameters = inspect.signature(peftcore.apply).parameters.values()
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == list(ARGUMENTS_OF_APPLY)


def test_an_installed_plugin_that_does_not_declare_its_api(discover) -> None:
    plugin = Answers([tiny.method("scale")])
    registry = discover(("scale", plugin, "peftcore-scale"))
    del plugin.peftcore_api
    with pytest.warns(
        UserWarning, match=r"'scale' .* does not declare which plugin APIs .*peftcore_api = \">=3.10,<4\""
    ):
        assert registry.methods() == {}


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (types.ModuleType("empty"), r"it has no hook. Mark its functions with @peftcore.plugin.hookimpl"),
        (tiny.Plugin(tiny.method("other")), r"the method is named 'other', but its entry point is named 'named'"),
        (tiny.Plugin("text"), r"must return peftcore.plugin.Method objects, found str"),
        (tiny.Plugin(Method("named", dict, None, StateRules("X"))), r"must be a frozen dataclass"),
        (
            tiny.Plugin(tiny.method("named", state=StateRules(peft_type=""))),
            r"StateRules.peft_type must be a non-empty string, .*found ''",
        ),
        (Answers(None), r"peftcore_methods\(\) must return a list of peftcore.plugin.Method objects, found NoneType"),
        (Answers(tiny.method("named")), r"must return a list of peftcore.plugin.Method objects, found Method"),
        *(
            (
                tiny.Plugin(Method("named", config, None, StateRules("X"))),
                rf"{config.__name__} has a field '{field}', which is an argument of peftcore.apply .*Rename the field",
            )
            for field in ARGUMENTS_OF_APPLY
            for config in [dataclasses.make_dataclass("FieldConfig", [(field, int, 1)], frozen=True)]
        ),
    ],
)
def test_malformed_methods(discover, plugin, message: str) -> None:
    registry = discover(("named", plugin, "peftcore-named"))
    with pytest.warns(UserWarning, match=message):
        assert registry.methods() == {}


@pytest.mark.parametrize("api", [">=4", ">=3.11,<4", "==2.*", "<3"])
def test_a_plugin_that_does_not_support_this_api(discover, api: str) -> None:
    plugin = tiny.Plugin(tiny.method("scale"))
    plugin.peftcore_api = api
    registry = discover(("scale", plugin, "peftcore-scale"))
    with pytest.warns(
        UserWarning, match=rf"supports the plugin APIs {re.escape(api)}, but this peftcore has 3.10. Upgrade"
    ):
        assert registry.methods() == {}


def test_an_addition_to_the_api_breaks_no_plugin(discover, monkeypatch) -> None:
    registry = discover(("scale", tiny.Plugin(tiny.method("scale")), "peftcore-scale"))
    monkeypatch.setattr(plugin_checks, "API", "3.11")
    assert list(registry.methods()) == ["scale"]


def test_a_message_never_names_a_package_that_may_be_a_strangers(discover, monkeypatch) -> None:
    """The name may be a typing error, or come from a stranger's file; whoever registered it would be run."""
    registry = discover(("scale", tiny.Plugin(tiny.method("scale")), "peftcore-scale"))
    with pytest.raises(peftcore.PluginError) as unknown:
        registry.method("scael")
    monkeypatch.setattr(peft_fields, "registry", registry)
    with pytest.raises(peftcore.PluginError) as foreign:
        peft_fields.method_of_fields("a file", {"peft_type": "EVIL_NAME"})
    assert "no PEFT method 'scael' is installed (nearest: 'scale'). Methods are separate packages" in str(unknown.value)
    assert str(unknown.value).endswith("Installed: scale")
    assert "no installed method reads peft_type 'EVIL_NAME' (installed: TOY_SCALE (scale))" in str(foreign.value)
    for error in (unknown, foreign):
        assert "pip install" not in str(error.value) and "evil-name" not in str(error.value)


def test_sys_exit_at_import_is_a_broken_plugin(discover, tmp_path, monkeypatch) -> None:
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit('goodbye')\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = discover(("scale", tiny.Plugin(tiny.method("scale")), "peftcore-scale"))
    found = [*plugin_discovery.entry_points(group="peftcore"), entry("leaving", "leaving", "peftcore-leaving")]
    monkeypatch.setattr(plugin_discovery, "entry_points", lambda group: found)
    with pytest.warns(UserWarning, match=r"'leaving' \(peftcore-leaving 1.0\) cannot be used: SystemExit: goodbye"):
        assert list(registry.methods()) == ["scale"]


class Failing:
    """A plugin whose hooks all raise."""

    @hookimpl
    def peftcore_architecture(self, model):
        raise KeyError("vision_config")

    @hookimpl
    def peftcore_weight_formats(self):
        raise SystemExit(3)

    @hookimpl
    def peftcore_integrations(self):
        raise ImportError("no module named 'fire'")


def test_a_hook_that_fails_is_named_and_stops_no_other(discover, monkeypatch) -> None:
    asked = []

    class Works:
        @hookimpl
        def peftcore_architecture(self):
            asked.append("architecture")
            return Architecture(hidden_size=7)

        @hookimpl
        def peftcore_integrations(self):
            asked.append("integrations")
            return []

    registry = discover(("works", Works(), "peftcore-works"), ("zfails", Failing(), "peftcore-zfails"))
    named = r"of the plugin 'zfails' \(peftcore-zfails 1.0\) failed: "
    with pytest.warns(UserWarning, match=rf"peftcore_architecture {named}KeyError: 'vision_config'"):
        (answer,) = registry.answers("peftcore_architecture", contain=True, first=True, model=None)
    assert answer[1].hidden_size == 7
    with pytest.warns(UserWarning, match=rf"peftcore_integrations {named}ImportError: no module named 'fire'"):
        list(registry.answers("peftcore_integrations", contain=True))
    assert asked == ["architecture", "integrations"]
    with pytest.raises(peftcore.PluginError, match=rf"peftcore_weight_formats {named}SystemExit: 3.*PEFTCORE_PLUGINS"):
        registry.offered("peftcore_weight_formats", WeightFormat)
    monkeypatch.setenv("PEFTCORE_STRICT_PLUGINS", "1")
    with pytest.raises(peftcore.PluginError, match=rf"peftcore_architecture {named}KeyError"):
        list(registry.answers("peftcore_architecture", contain=True, first=True, model=None))


def test_detect_goes_on_without_a_plugin_that_fails(discover, monkeypatch) -> None:
    from peftcore.model import detecting

    monkeypatch.setattr(detecting, "registry", discover(("fails", Failing(), "peftcore-fails")))
    with pytest.warns(UserWarning, match="peftcore continues without it"):
        assert detecting.detect(tiny.llama()).hidden_size == tiny.llama().config.hidden_size


@pytest.mark.parametrize("answer", ["text", 7, {"hidden_size": 8}])
def test_an_architecture_of_another_type_is_refused(discover, monkeypatch, answer: object) -> None:
    from peftcore.model import detecting

    class Wrong:
        @hookimpl
        def peftcore_architecture(self, model):
            return answer

    monkeypatch.setattr(detecting, "registry", discover(("wrong", Wrong(), "peftcore-wrong")))
    with pytest.raises(
        peftcore.PluginError,
        match=rf"'wrong' .* must return a peftcore.plugin.Architecture or None, found {type(answer).__name__}",
    ):
        detecting.detect(tiny.llama())


def test_two_plugins_that_describe_one_model_differently_are_refused(discover, monkeypatch) -> None:
    from peftcore.model import detecting

    class Sized:
        def __init__(self, size: int) -> None:
            self.size = size

        @hookimpl
        def peftcore_architecture(self, model):
            return Architecture(hidden_size=self.size) if isinstance(model, torch.nn.Linear) else None

    one, two = ("one", Sized(1), "peftcore-one"), ("two", Sized(2), "peftcore-two")
    monkeypatch.setattr(detecting, "registry", discover(one, two))
    with pytest.raises(peftcore.PluginError, match=r"'two' .* and the plugin 'one' .* describe Linear differently"):
        detecting.detect(torch.nn.Linear(2, 2))
    assert detecting.detect(tiny.llama()).hidden_size == tiny.llama().config.hidden_size  # neither describes it
    monkeypatch.setattr(detecting, "registry", discover(one, ("three", Sized(1), "peftcore-three")))
    assert detecting.detect(torch.nn.Linear(2, 2)).hidden_size == 1


@pytest.mark.parametrize("api", ["3", 3, 1.0, True, None, "", "three"])
def test_a_plugin_api_that_is_no_range(discover, api: object) -> None:
    plugin = tiny.Plugin(tiny.method("scale"))
    plugin.peftcore_api = api
    with pytest.warns(UserWarning, match=rf"must be the range of plugin APIs .*found {re.escape(repr(api))}"):
        assert discover(("scale", plugin, "peftcore-scale")).methods() == {}


def test_a_plugin_that_needs_another_peftcore(discover, monkeypatch) -> None:
    registry = discover(("scale", tiny.Plugin(tiny.method("scale")), "peftcore-scale"))
    (found,) = plugin_discovery.entry_points(group="peftcore")
    found.dist.requires = ["torch>=2", "peftcore>=99", "pytest; extra == 'test'"]
    with pytest.warns(UserWarning, match=r"it needs peftcore>=99, but peftcore .*Upgrade the older of the two"):
        assert registry.methods() == {}


def test_the_environment_chooses_plugins(discover, monkeypatch) -> None:
    plugins = [(name, tiny.Plugin(tiny.method(name)), f"peftcore-{name}") for name in ("one", "three", "two")]
    monkeypatch.setenv("PEFTCORE_PLUGINS", "one, two")
    assert list(discover(*plugins).methods()) == ["one", "two"]
    with pytest.raises(peftcore.PluginError, match=r"'three' .* disabled by PEFTCORE_PLUGINS=one, two"):
        discover(*plugins).method("three")
    monkeypatch.setenv("PEFTCORE_PLUGINS", "none")
    registry = discover(*plugins, ("broken", None, "peftcore-broken"))
    assert registry.methods() == {}  # and nothing was imported: no warning of the broken one
    assert [plugin.name for plugin in registry.plugins()] == ["broken", "one", "three", "two"]
    monkeypatch.setenv("PEFTCORE_PLUGINS", "one,tow")
    with pytest.raises(
        peftcore.PluginError, match=r"PEFTCORE_PLUGINS names 'tow', which is not installed \(nearest: 'two'"
    ):
        discover(*plugins).methods()
    monkeypatch.setenv("PEFTCORE_PLUGINS", "")
    assert list(discover(*plugins).methods()) == ["one", "three", "two"]


def test_plugins_load_at_the_first_question_only(discover) -> None:
    registry = discover(("broken", None, "peftcore-broken"))
    assert not registry._discovered  # importing peftcore imports no plugin


def test_the_documented_hooks_are_the_real_ones() -> None:
    import pathlib

    from peftcore.plugin import hooks as hookspecs

    root = pathlib.Path(__file__).parents[2]
    text = "".join(path.read_text() for path in sorted((root / "docs").glob("plugin*.md")))
    for name in dir(hookspecs):
        if name.startswith("peftcore_"):
            assert f"`{name}" in text, f"{name} is not documented in docs/plugin*.md"


def test_plugins_are_listed_with_broken_ones_and_without_warnings(discover, monkeypatch) -> None:
    registry = discover(
        ("scale", tiny.Plugin(tiny.method("scale")), "peftcore-scale"), ("other", None, "peftcore-other")
    )
    monkeypatch.setattr("peftcore.plugin.registry.registry", registry)
    monkeypatch.setenv("PEFTCORE_STRICT_PLUGINS", "1")
    other, scale = peftcore.plugins()
    assert (scale.name, scale.distribution, scale.methods, scale.error) == ("scale", "peftcore-scale", ("scale",), None)
    assert scale.hooks == ("peftcore_methods",)
    assert other.name == "other" and other.methods == () and other.error is not None
    assert peftcore.method("SCALE").name == "scale"
