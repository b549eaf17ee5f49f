"""`peftcore plugins`: installed plugins, what they provide, and errors of broken ones."""

from __future__ import annotations

import os
import warnings

from peftcore.cli.console import NO_METHOD, say, table

EXAMPLES = ("peftcore plugins",)


def plugins() -> None:
    """List the installed plugins; broken ones with the reason."""
    from peftcore.plugin.registry import STRICT, registry

    # The list shows broken plugins and must not fail because of them.
    strict = os.environ.pop(STRICT, None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            listed = registry.plugins()
    finally:
        if strict is not None:
            os.environ[STRICT] = strict
    if not listed:
        say(NO_METHOD)
        return
    table(
        (
            (p.name, p.distribution, p.version, ", ".join(p.hooks) or "-", f"broken: {p.error}" if p.error else "works")
            for p in listed
        ),
        ("plugin", "distribution", "version", "hooks", "state"),
    )
