"""Registry of installed plugins.

Plugins are found by entry point and imported one by one, so that a broken plugin does not affect the others.

pluggy's `load_setuptools_entrypoints` is not used, because it imports all plugins at once, stops at the first failure,
and silently drops a second distribution with the same name.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pluggy

from peftcore.errors import PeftcoreError, PluginError, nearest, warn
from peftcore.plugin import checks as plugin_checks, discovery as plugin_discovery, hooks as hookspecs
from peftcore.plugin.checks import canonical
from peftcore.plugin.discovery import CHOSEN, CORE, Plugin
from peftcore.plugin.exporter import Exporter
from peftcore.plugin.extensions import Command, Integration
from peftcore.plugin.plugin_errors import all_are, failure, failure_with_advice, is_passed_on, naming_plugin

if TYPE_CHECKING:  # imported on first use, because the command line looks up commands before PyTorch is loaded
    from peftcore.plugin.method import Method

STRICT = "PEFTCORE_STRICT_PLUGINS"
COMMANDS = "peftcore_commands"
LISTS = (  # hooks that return a list, never None
    "peftcore_methods",
    "peftcore_weight_formats",
    "peftcore_checkpoint_formats",
    "peftcore_exporters",
    COMMANDS,
    "peftcore_tasks",
    "peftcore_integrations",
)

# Never suggest a package name derived from a method's name, since anyone can register such a package.
HOW_TO_INSTALL = (
    "Methods are separate packages: install the package of this method. `peftcore methods` lists the methods"
)


class Named(Protocol):
    """Object that a hook returns and that is looked up by name."""

    @property
    def name(self) -> str: ...


Offered = TypeVar("Offered", bound=Named)


_BUILTIN: dict[str, ModuleType] = {}  # modules of the core that implement hooks, by name


def builtin(module: ModuleType) -> None:
    """Register the hooks of a core module. The module calls this on import.

    These hooks are called after the plugins' hooks, and their errors are not wrapped.
    """
    _BUILTIN[module.__name__] = module


class Registry:
    """The plugins of one process. Discovery runs once, on first use."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("peftcore")
        self._manager.add_hookspecs(hookspecs)
        self._plugins: dict[str, Plugin] = {}  # by canonical name
        self._discovered = False
        self._built_in = 0  # number of built-ins that are registered with pluggy
        # cache: {hook: (number of built-ins at that time, objects from its implementations, by name)}
        self._offered: dict[str, tuple[int, dict[str, tuple[Plugin, Any]]]] = {}

    @property
    def hook(self) -> Any:
        """Hook caller of pluggy, with all working plugins and the built-in hooks registered."""
        self.plugins()
        return self._with_builtin()

    def _with_builtin(self) -> Any:
        for name in list(_BUILTIN)[self._built_in :]:
            self._manager.register(_BUILTIN[name], name=name)
            self._built_in += 1
        return self._manager.hook

    def plugins(self) -> list[Plugin]:
        """Return all plugins by name, including broken ones."""
        if not self._discovered:
            self._discovered = True
            self._discover()
        return [self._plugins[name] for name in sorted(self._plugins)]

    def methods(self) -> dict[str, Method]:
        """Return the usable methods by name."""
        return {method.name: method for plugin in self.plugins() for method in plugin.methods}

    def method(self, name: str) -> Method:
        """Return the method `name`. Names are compared like package names.

        Raises:
            PluginError: the method is not installed, or its plugin is broken.
        """
        methods = self.methods()
        if name in methods:
            return methods[name]
        for installed_name, method in methods.items():
            if canonical(installed_name) == canonical(name):
                return method
        plugin = self._plugins.get(canonical(name))
        if plugin is not None and plugin.error:
            raise PluginError(
                f"the plugin '{plugin.name}' ({plugin.distribution} {plugin.version}) is broken: {plugin.error}"
            )
        names = ", ".join(methods) or "none"
        raise PluginError(
            f"no PEFT method '{name}' is installed{nearest(name, methods)}. {HOW_TO_INSTALL}. Installed: {names}"
        )

    def plugin_of(self, method: str) -> Plugin:
        """Return the plugin of the installed method `method`."""
        return self._plugins.get(canonical(method), Plugin(method))

    def method_of_config(self, config: Any) -> Method:
        """Return the method with the config class of `config`."""
        for method in self.methods().values():
            if type(config) is method.config_class:
                return method
        name, class_names = type(config).__name__, [method.config_class.__name__ for method in self.methods().values()]
        raise PluginError(
            f"{name} is not the config of an installed method{nearest(name, class_names)}. Install the package of its "
            "plugin (pip install -e FOLDER). `peftcore plugins` lists what is installed"
        )

    def exporters(self) -> dict[str, tuple[Plugin, Exporter]]:
        """Return the export formats by name, with their plugins.

        Raises:
            PluginError: a plugin returns another type of object, or a name that is taken.
        """
        return self.offered("peftcore_exporters", Exporter, contain=True)

    def integrations(self) -> dict[str, tuple[Plugin, Integration]]:
        """Return the integrations with other libraries by name, with their plugins.

        Raises:
            PluginError: a plugin's hook fails or returns another type of object, or a name is taken.
        """
        return self.offered("peftcore_integrations", Integration)

    def commands(self, typed: str | None = None) -> dict[str, Command]:
        """Return the commands of the command line by name, the core's first.

        Only plugins whose source mentions the hook are imported, and none if `typed` is a command of the core.

        Raises:
            PluginError: a plugin returns another type of object, or a name that is taken.
        """
        implementations = getattr(self._with_builtin(), COMMANDS).get_hookimpls()
        core = [
            command
            for implementation in implementations
            if implementation.plugin_name in _BUILTIN
            for command in implementation.function()
        ]
        if typed in (command.name for command in core):
            return {command.name: command for command in core}
        objects = self.offered(COMMANDS, Command, contain=True)
        return {name: objects[name][1] for name in sorted(objects, key=lambda name: objects[name][0] is not CORE)}

    def offered(self, hook: str, kind: type[Offered], *, contain: bool = False) -> dict[str, tuple[Plugin, Offered]]:
        """Return the objects from all implementations of a list-returning hook, by name, with their plugins.

        Raises:
            PluginError: an implementation fails (a warning with `contain`) or does not return a list of `kind`, or two
                objects have the same name.
        """
        cache_entry = self._offered.get(hook)
        if cache_entry is not None and cache_entry[0] == len(_BUILTIN):
            return cache_entry[1]
        objects: dict[str, tuple[Plugin, Any]] = {}
        for plugin, answer in self.answers(hook, contain=contain):
            for item in all_are(kind, plugin, hook, answer):
                if item.name in objects:
                    other_plugin, this_plugin = objects[item.name][0], plugin
                    raise PluginError(
                        f"{hook}: {other_plugin} and {this_plugin} both provide '{item.name}'. Rename one of the "
                        f"two, or list the plugins to use without one of them: {CHOSEN}=NAME,NAME"
                    )
                names_plugin = hook == "peftcore_weight_formats" and plugin is not CORE
                objects[item.name] = plugin, naming_plugin(plugin, item) if names_plugin else item
        self._offered[hook] = len(_BUILTIN), objects
        return objects

    def answers(
        self, hook: str, *, contain: bool = False, first: bool = False, **arguments: Any
    ) -> Iterator[tuple[Plugin, Any]]:
        """Yield (plugin, result of its `hook`) for every plugin that has one, then for the core.

        The order is pluggy's, last registered first. With `first`, the core's hook is only called if no plugin returned
        a result.

        Raises:
            PluginError: a plugin's hook fails. With `contain`, this is a warning, and the other plugins are used.
        """
        has_answer = False
        if hook == COMMANDS and not self._discovered:
            self._discover(COMMANDS)
        else:
            self.plugins()
        implementations = reversed(getattr(self._with_builtin(), hook).get_hookimpls())
        for implementation in sorted(
            implementations, key=lambda hook_implementation: hook_implementation.plugin_name in _BUILTIN
        ):
            hook_arguments = {name: arguments[name] for name in implementation.argnames}
            if implementation.plugin_name in _BUILTIN:
                if first and has_answer:
                    return
                answer = implementation.function(**hook_arguments)
                if answer is not None:
                    yield CORE, answer
                continue
            plugin = self._plugins[canonical(implementation.plugin_name)]
            try:
                answer = implementation.function(**hook_arguments)
            except (Exception, SystemExit) as error:
                if not contain:
                    raise PluginError(failure_with_advice(hook, plugin, error)) from error
                self.go_on_without(hook, plugin, error)
                continue
            if answer is not None or hook in LISTS:
                has_answer = True
                yield plugin, answer

    def go_on_without(self, subject: str, plugin: Plugin, error: BaseException) -> None:
        """Warn that `what` of a plugin failed with `error` and is skipped. If plugins are strict, raise the error."""
        if os.environ.get(STRICT) == "1":
            raise PluginError(failure_with_advice(subject, plugin, error)) from error
        warn(f"{failure(subject, plugin, error)}. peftcore continues without it")

    @contextmanager
    def naming(self, method: str | Plugin, function: str) -> Iterator[None]:
        """Add the plugin (or the plugin of `method`) and its `function` to errors raised in the block.

        peftcore's errors, warnings turned into errors, and out-of-memory errors are passed on unchanged.

        Raises:
            PluginError: the block raised another exception.
        """
        try:
            yield
        except Exception as error:
            if is_passed_on(error):
                raise
            plugin = method if isinstance(method, Plugin) else self.plugin_of(method)
            raise PluginError(failure(f"`{function}`", plugin, error)) from error

    def register(self, name: str, plugin: Any, distribution: str = "-", version: str = "-") -> Plugin:
        """Register the plugin object `plugin` (a module, or any object with hooks) under the entry-point name `name`.

        Raises:
            PluginError: a hook is misspelt, a method is malformed, or its name is taken.
        """
        self.plugins()
        existing_plugin = self._plugins.get(canonical(name))
        if existing_plugin is not None and not existing_plugin.error:
            raise PluginError(
                f"a plugin '{existing_plugin.name}' is already registered by {existing_plugin.distribution}"
            )
        entry = Plugin(name, distribution, version)
        entry.methods = self._register(entry, plugin)
        self._plugins[canonical(name)] = entry
        self._offered.clear()
        return entry

    def unregister(self, name: str) -> None:
        """Remove the plugin `name`."""
        self.plugins()
        entry = self._plugins.pop(canonical(name), None)
        if entry is not None and self._manager.get_plugin(entry.name) is not None:
            self._manager.unregister(name=entry.name)
            self._offered.clear()

    def _discover(self, hook: str | None = None) -> None:
        """Import the installed plugins; with `hook`, only plugins whose source mentions it."""
        by_name, allowed_names = plugin_discovery.installed(), plugin_discovery.chosen()
        for name in allowed_names or ():
            if canonical(name) not in by_name:
                self._forget()
                raise PluginError(f"{CHOSEN} names '{name}', which is not installed{nearest(name, by_name)}")
        problems: list[str] = []
        for key, candidates in sorted(by_name.items()):
            is_asked = hook is None or any(plugin_discovery.mentions(entry_point, hook) for entry_point in candidates)
            if key in self._plugins or not is_asked:
                continue
            name, dist = candidates[0].name, candidates[0].dist
            plugin = Plugin(name, dist.name if dist else "-", dist.version if dist else "-")
            self._plugins[key] = plugin
            if allowed_names is not None and key not in map(canonical, allowed_names):
                plugin.error = f"it is disabled by {CHOSEN}={os.environ[CHOSEN]}"
                continue
            if len(candidates) > 1:
                owner, *other_owners = [plugin_discovery.owner(candidate, name) for candidate in candidates]
                problems.append(
                    f"{len(candidates)} distributions provide the peftcore plugin '{name}': {owner} is used, and "
                    f"{', '.join(other_owners)} is ignored. Uninstall all but one of them"
                )
            self._load(plugin, candidates[0], problems)
        for message in problems:  # after all plugins are loaded, since a warning may be turned into an error
            warn(message)

    def _load(self, plugin: Plugin, entry_point: EntryPoint, problems: list[str]) -> None:
        """Import a plugin and register it. A failure is stored in `plugin.error` and added to `problems`.

        Raises:
            PluginError: the import failed, and plugins are strict.
        """
        try:
            plugin_checks.check_requirement(entry_point.dist)
            module = entry_point.load()
            plugin_checks.check_api_declared(module)
            plugin.methods = self._register(plugin, module)
        except KeyboardInterrupt:
            self._forget()
            raise
        except BaseException as error:  # an import may end in SystemExit
            plugin.error = str(error) if isinstance(error, PeftcoreError) else f"{type(error).__name__}: {error}"
            origin = f"{plugin.distribution} {plugin.version}"
            message = f"the peftcore plugin '{plugin.name}' ({origin}) cannot be used: {plugin.error}"
            if os.environ.get(STRICT) == "1":
                self._forget()
                raise PluginError(message) from error
            problems.append(message)

    def _forget(self) -> None:
        """Clear the cache, so that plugins are discovered again on next use."""
        self._plugins, self._discovered = {}, False
        self._offered.clear()

    def _register(self, entry: Plugin, plugin: Any) -> list[Method]:
        plugin_checks.check_api(plugin)
        plugin_checks.check_hook_names(self._manager, entry.name, plugin)
        try:
            self._manager.register(plugin, name=entry.name)
            self._manager.check_pending()
            callers = self._manager.get_hookcallers(plugin) or []
            entry.hooks = sorted(caller.name for caller in callers)
            if not entry.hooks:
                raise PluginError(
                    "it has no hook. Mark its functions with @peftcore.plugin.hookimpl, at least peftcore_methods()"
                )
            implementations = self._manager.hook.peftcore_methods.get_hookimpls()
            answers = [
                implementation.function() for implementation in implementations if implementation.plugin is plugin
            ]
            methods = [method for answer in answers for method in plugin_checks.list_of_methods(answer)]
            for method in methods:
                plugin_checks.check_method(entry.name, method)
        except BaseException:
            if self._manager.get_plugin(entry.name) is not None:
                self._manager.unregister(name=entry.name)
            raise
        return methods


registry = Registry()


def register(name: str, plugin: Any) -> None:
    """Register a plugin that is not in a package, for example in a notebook, until the process ends.

    Args:
        name: name that the entry point of a package would have.
        plugin: a module, or an object whose methods are hooks, with `peftcore_api`.

    Raises:
        PluginError: a hook is misspelt, a method is malformed, or its name is taken.
    """
    registry.register(name, plugin)


def methods() -> dict[str, Method]:
    """Return the usable installed methods by name.

    Examples:
        >>> "lora" in peftcore.methods()
        True
    """
    return registry.methods()


def method(name: str) -> Method:
    """Return an installed method by name, ignoring case and the difference between `-` and `_`.

    Raises:
        PluginError: the method is not installed, or its plugin is broken.

    Examples:
        >>> peftcore.method("lora").learning_rate
        0.001
    """
    return registry.method(name)


@dataclass(frozen=True)
class PluginInfo:
    """An installed plugin.

    Args:
        name: name of its entry point.
        distribution, version: the package that provides it, "-" if unknown.
        hooks: names of the hooks that it implements.
        methods: names of its methods.
        error: why the plugin cannot be used, or None if it works.
    """

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...]
    methods: tuple[str, ...]
    error: str | None


def plugins() -> list[PluginInfo]:
    """Return all installed plugins by name. Broken plugins have `error` set and cause no warning.

    Examples:
        >>> [plugin.name for plugin in peftcore.plugins() if plugin.error]    # broken plugins
        []
    """
    # Strict plugins would raise the first error instead of listing all plugins.
    strict = os.environ.pop(STRICT, None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plugins_found = registry.plugins()
    finally:
        if strict is not None:
            os.environ[STRICT] = strict
    return [
        PluginInfo(
            name=plugin.name,
            distribution=plugin.distribution,
            version=plugin.version,
            hooks=tuple(plugin.hooks),
            methods=tuple(method.name for method in plugin.methods),
            error=plugin.error,
        )
        for plugin in plugins_found
    ]


def commands(typed: str | None = None) -> dict[str, Command]:
    """Return the commands of the command line by name, starting with commands of modules registered by `builtin`.

    Args:
        typed: name of the command to run. If a module registered by `builtin` has this command, no plugin is imported.

    Raises:
        PluginError: a plugin returns another type of object, or a name that is taken.
    """
    return registry.commands(typed)


def offered(hook: str, kind: type[Offered]) -> dict[str, Offered]:
    """Return the objects that a hook returns, by name, first from modules registered by `builtin`, then from plugins.

    A failing plugin is skipped with a warning.

    Args:
        hook: a hook that returns a list, such as "peftcore_commands".
        kind: class of the objects.

    Raises:
        PluginError: a plugin returns another type of object, or a name that is taken.
    """
    objects = registry.offered(hook, kind, contain=True)
    return {name: objects[name][1] for name in sorted(objects, key=lambda name: objects[name][0] is not CORE)}
