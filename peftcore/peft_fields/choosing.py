"""Which of the installed methods reads a file: several may have one peft_type, and no plugin displaces another.

Of the methods of the file's peft_type come first those whose `StateRules.matches` takes it, then those that do not ask;
those whose `matches` declines are out. One that takes a file in which nothing is set (PEFT's defaults) asks for
nothing, and comes with those that do not ask. A file that was saved here names its method.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Mapping
from typing import Any

from peftcore.errors import PeftcoreError, PluginError
from peftcore.method import Method
from peftcore.peft_fields.config import COMMON, own_of
from peftcore.peft_fields.defaults import defaults, says_something
from peftcore.registry import HOW_TO_INSTALL, Plugin, canonical, registry
from peftcore.validation import shown

Offered = tuple[Method, Plugin]


def method_of_fields(
    where: str,
    fields: Mapping[str, Any],
    own: Mapping[str, Any] | None = None,
    *,
    written_by: str | None = None,
    method: str | None = None,
    say: str = "peftcore.load(..., method='{}')",
) -> Method:
    """The method that reads these fields.

    Args:
        where: they stand, for messages.
        own: fields that PEFT does not know (`StateRules.own_fields`); each method sees its own.
        written_by: the method that wrote them, if that is known; it reads them where it is installed.
        method: the one that the user names.
        say: how the user names one, for messages.

    Raises:
        PluginError: none reads them, or several do; or the one that is named does not.
    """
    peft_type = fields["peft_type"]
    offered = of_peft_type(peft_type)
    if method is not None:
        return _named(where, offered, fields, own or {}, method)
    if not offered:
        all_methods = [m for m in registry.methods().values() if m.recorded_as is None]
        known = ", ".join(f"{m.state.peft_type} ({m.name})" for m in all_methods) or "none"
        raise PluginError(f"no installed method reads peft_type {peft_type!r} (installed: {known}). {HOW_TO_INSTALL}")
    levels = {m.name: _level(m, plugin, fields, own or {}) for m, plugin in offered}
    left = [(m, plugin) for m, plugin in offered if levels[m.name] is not None]
    if written_by is not None:
        writer = next((m for m, _ in left if canonical(m.name) == canonical(written_by)), None)
        if writer is not None:
            return writer
    if not left:
        raise PluginError(
            f"no installed method reads {where}, {_set_in(fields, own or {})}: {_in_words(offered)} "
            f"{'says that it is not its own' if len(offered) == 1 else 'say that it is not theirs'}. {HOW_TO_INSTALL}"
        )
    highest = max(levels[m.name] or 0 for m, _ in left)
    best = [(m, plugin) for m, plugin in left if levels[m.name] == highest]
    if len(best) > 1:
        raise PluginError(
            f"{where}, {_set_in(fields, own or {})}, may be read by any of {len(best)} installed methods: "
            f"{_in_words(best)}. Say which: {say.format('NAME')}; or name the plugins to use without the "
            "others: PEFTCORE_PLUGINS=NAME,NAME"
        )
    chosen = best[0][0]
    if written_by is not None:
        there = canonical(written_by) in map(canonical, registry.methods())
        what = "which does not read it" if there else "which is not installed"
        warnings.warn(
            f"{where} was written by the method {shown(written_by)}, {what}. '{chosen.name}' reads it as any file of "
            f"peft_type {shown(peft_type)}",
            stacklevel=2,
        )
    return chosen


def why_unknown(method: Method, name: str, value: Any) -> str:
    """` ..`, of a field that the method's config does not have and PEFT's has: whose it is, or why it is refused."""
    peft_type = method.state.peft_type
    if not says_something(peft_type, name, value):
        return ""
    with contextlib.suppress(Exception), warnings.catch_warnings():  # of a plugin, which may want more fields
        warnings.simplefilter("ignore")
        other = method_of_fields("", {**defaults(peft_type), "peft_type": peft_type, name: value})
        if other is not method:
            return f". It is of the method '{other.name}': peftcore.apply(model, '{other.name}', ...)"
        try:
            method.state.read_config({name: value})
        except PeftcoreError as error:
            return f". A file of PEFT's with it is refused: {error}"
    return ""


def refuse_not_its_own(method: Method, fields: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise a PluginError if the method's `matches` declines the fields that are written for it."""
    if method.state.matches is None:
        return
    fields, own = (json.loads(json.dumps(each)) for each in (fields, own))  # as they are read
    for candidate, plugin in of_peft_type(fields["peft_type"]):
        if candidate is method and _level(method, plugin, fields, own) is None:
            raise PluginError(
                f"StateRules.matches of '{method.name}' ({plugin.distribution} {plugin.version}) does not take the "
                f"file that would be written, {_set_in(fields, own)}: another would read it. Upgrade the plugin; "
                "the adapter's values are in model.state_dict() meanwhile"
            )


def of_peft_type(peft_type: str) -> list[Offered]:
    """The installed methods that read files of this `peft_type`, each with its plugin."""
    return [
        (method, plugin)
        for plugin in registry.plugins()
        for method in plugin.methods
        if method.recorded_as is None and peft_type in {method.state.peft_type, *method.state.older_types}
    ]


def _named(where: str, offered: list[Offered], fields: Mapping[str, Any], own: Mapping[str, Any], name: str) -> Method:
    method = registry.method(name)
    for candidate, plugin in offered:
        if candidate is method:
            if _level(method, plugin, fields, own) is None:
                raise PluginError(f"'{method.name}' says that {where}, {_set_in(fields, own)}, is not its own")
            return method
    if method.recorded_as is not None:
        raise PluginError(f"'{method.name}' has no files: its adapters are those of another method. Name that one")
    raise PluginError(
        f"'{method.name}' reads peft_type {method.state.peft_type!r}, {where} has {shown(fields['peft_type'])}"
    )


def _level(method: Method, plugin: Plugin, fields: Mapping[str, Any], own: Mapping[str, Any]) -> int | None:
    """1: its `matches` takes these fields for what is set in them; 0: it takes any; None: it does not take them."""
    if method.state.matches is None:
        return 0
    try:
        if not method.state.matches({**fields, **own_of(method, own)}):
            return None
    except (Exception, SystemExit) as error:
        registry.go_on_without(f"StateRules.matches of '{method.name}'", plugin, error)
        return None
    peft_type = method.state.peft_type
    with contextlib.suppress(Exception, SystemExit):  # of fields that are not there
        return int(not method.state.matches({**defaults(peft_type), "peft_type": peft_type}))
    return 1


def _in_words(offered: list[Offered]) -> str:
    return ", ".join(f"'{method.name}' ({plugin.distribution} {plugin.version})" for method, plugin in offered)


def _set_in(fields: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """`of peft_type 'X' with r, use_rslora set`."""
    peft_type = str(fields["peft_type"])
    said = {**fields, **own}.items()
    found = sorted(n for n, value in said if n not in COMMON and says_something(peft_type, n, value))
    names = ", ".join([*(shown(name)[1:-1] for name in found[:12]), *(["..."] if len(found) > 12 else [])])
    return f"of peft_type {shown(peft_type)}" + (f" with {names} set" if found else "")
