"""`peftcore plugins`: installed plugins, what they provide, and errors of broken ones."""

from __future__ import annotations

from peftcore.cli.console import NO_METHOD, say, table

EXAMPLES = ("peftcore plugins",)


def plugins() -> None:
    """List the installed plugins; broken ones with the reason."""
    import peftcore

    listed = peftcore.plugins()
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
