"""Plugins: found one by one, refused with their names, and the rest goes on."""

import sys
import types
from importlib.metadata import EntryPoint

import pytest
import tiny

import peftcore
from peftcore import registry as registry_module
from peftcore.registry import Registry


class Distribution:
    def __init__(self, name: str, version: str = "1.0") -> None:
        self.name, self.version = name, version


def entry(name: str, value: str, distribution: str) -> EntryPoint:
    entry_point = EntryPoint(name, value, "peftcore")
    vars(entry_point)["dist"] = Distribution(distribution)
    return entry_point


@pytest.fixture
def discover(monkeypatch):
    """A registry that finds the plugin objects given as {entry point: (object, distribution)}."""

    def discover(*entries: tuple[str, object, str]) -> Registry:
        entry_points = []
        for index, (name, plugin, distribution) in enumerate(entries):
            module = types.ModuleType(f"plugin_{index}")
            module.plugin = plugin
            monkeypatch.setitem(sys.modules, module.__name__, module)
            attribute = "plugin" if plugin is not None else "missing"
            entry_points.append(entry(name, f"{module.__name__}:{attribute}", distribution))
        monkeypatch.setattr(registry_module, "entry_points", lambda group: entry_points)
        return Registry()

    return discover


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
    with pytest.warns(UserWarning, match=r"plugin 'broken' \(peftcore-broken 1.0\) is not usable: AttributeError"):
        assert list(registry.methods()) == ["scale"]
    with pytest.raises(peftcore.PluginError, match=r"'broken' \(peftcore-broken 1.0\) is broken: AttributeError"):
        registry.method("broken")


def test_strict_makes_it_an_error(discover, monkeypatch) -> None:
    monkeypatch.setenv("PEFTCORE_STRICT_PLUGINS", "1")
    with pytest.raises(peftcore.PluginError, match="'broken'"):
        discover(("broken", None, "peftcore-broken")).methods()


def test_one_name_from_two_distributions_names_both(discover) -> None:
    method = tiny.method("scale")
    registry = discover(("scale", tiny.Plugin(method), "peftcore-scale"), ("scale", tiny.Plugin(method), "other"))
    with pytest.warns(UserWarning, match=r"peftcore-scale 1.0; other 1.0. Uninstall all but one"):
        assert registry.methods() == {}
    with pytest.raises(peftcore.PluginError, match="2 distributions provide 'scale'"):
        registry.method("scale")


def test_one_peft_type_from_two_names_both(discover) -> None:
    state = peftcore.StateRules(peft_type="SAME")
    registry = discover(
        ("one", tiny.Plugin(tiny.method("one", state=state)), "peftcore-one"),
        ("two", tiny.Plugin(tiny.method("two", state=state)), "peftcore-two"),
    )
    with pytest.warns(UserWarning, match=r"'SAME' is taken by 'one' \(peftcore-one 1.0\); peftcore-two 1.0 claims it"):
        assert list(registry.methods()) == ["one"]


def test_a_misspelt_hook_shows_the_nearest(discover) -> None:
    class Misspelt:
        @peftcore.hookimpl
        def peftcore_method(self):
            return []

    registry = discover(("misspelt", Misspelt(), "peftcore-misspelt"))
    with pytest.warns(UserWarning, match=r"'peftcore_method' is no hook of peftcore \(nearest: 'peftcore_methods'"):
        registry.methods()


def test_a_hook_with_a_wrong_argument_is_broken(discover) -> None:
    class Wrong:
        @peftcore.hookimpl
        def peftcore_architecture(self, modell):
            return None

    with pytest.warns(UserWarning, match="modell"):
        discover(("wrong", Wrong(), "peftcore-wrong")).methods()


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (types.ModuleType("empty"), r"it has no hook. Mark its functions with @peftcore.hookimpl"),
        (tiny.Plugin(tiny.method("other")), r"the method is named 'other' but its entry point 'named'"),
        (tiny.Plugin("text"), r"must return peftcore.Method objects, found str"),
        (tiny.Plugin(peftcore.Method("named", dict, None, peftcore.StateRules("X"))), r"must be a frozen dataclass"),
    ],
)
def test_malformed_methods(discover, plugin, message: str) -> None:
    registry = discover(("named", plugin, "peftcore-named"))
    with pytest.warns(UserWarning, match=message):
        assert registry.methods() == {}


@pytest.mark.parametrize(("api", "upgrade"), [(2, "peftcore"), (0, "the plugin")])
def test_another_plugin_api_says_what_to_upgrade(discover, api: int, upgrade: str) -> None:
    plugin = tiny.Plugin(tiny.method("scale"))
    plugin.peftcore_api = api
    registry = discover(("scale", plugin, "peftcore-scale"))
    with pytest.warns(UserWarning, match=rf"plugin API {api}, this peftcore has 1. Upgrade {upgrade}"):
        assert registry.methods() == {}


def test_unknown_method_says_what_to_install(discover) -> None:
    with pytest.raises(
        peftcore.PluginError, match=r"no PEFT method 'x' is installed \(installed: none\). Try: pip install peftcore-x"
    ):
        discover().method("x")


def test_plugins_load_at_the_first_question_only(discover) -> None:
    registry = discover(("broken", None, "peftcore-broken"))
    assert registry._plugins is None  # importing peftcore imports no plugin


def test_the_documented_hooks_are_the_real_ones() -> None:
    import pathlib

    from peftcore import hookspecs

    root = pathlib.Path(__file__).parent.parent
    text = (root / "README.md").read_text() + (root / "CONTRIBUTING.md").read_text()
    for name in dir(hookspecs):
        if name.startswith("peftcore_"):
            assert f"`{name}" in text, f"{name} is documented neither in README.md nor in CONTRIBUTING.md"
