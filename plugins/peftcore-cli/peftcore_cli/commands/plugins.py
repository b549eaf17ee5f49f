"""`peftcore plugins`: list the installed plugins, their hooks, the errors of broken ones, and all tasks."""

from __future__ import annotations

from dataclasses import asdict

from peftcore_cli import options
from peftcore_cli.console import NO_METHOD, say, table

EXAMPLES = ("peftcore plugins",)


def plugins(as_json: options.Json = False) -> object:
    """List the installed plugins with the errors of broken ones, and all tasks."""
    import peftcore
    from peftcore_cli.tasks import registered

    installed_plugins = peftcore.plugins()
    if as_json:
        tasks = [task.name for task in registered.tasks()]
        return {"plugins": [asdict(plugin) for plugin in installed_plugins], "tasks": tasks}
    if not installed_plugins:
        say(NO_METHOD)
        return None
    table(
        (
            (p.name, p.distribution, p.version, ", ".join(p.hooks) or "-", f"broken: {p.error}" if p.error else "works")
            for p in installed_plugins
        ),
        ("plugin", "distribution", "version", "hooks", "state"),
    )
    say(f"\ntasks: {', '.join(task.name for task in registered.tasks())}")
    return None
