"""`peftcore plugins`: list the installed plugins, their hooks, and the errors of broken ones."""

from __future__ import annotations

from dataclasses import asdict

from peftcore_cli import options
from peftcore_cli.console import NO_METHOD, say, table

EXAMPLES = ("peftcore plugins",)


def plugins(as_json: options.Json = False) -> object:
    """List the installed plugins, and why any of them is broken."""
    import peftcore

    installed = peftcore.plugins()
    if as_json:
        return {"plugins": [asdict(plugin) for plugin in installed]}
    if not installed:
        say(NO_METHOD)
        return None
    table(
        (
            (p.name, p.distribution, p.version, ", ".join(p.hooks) or "-", f"broken: {p.error}" if p.error else "works")
            for p in installed
        ),
        ("plugin", "distribution", "version", "hooks", "state"),
    )
    return None
