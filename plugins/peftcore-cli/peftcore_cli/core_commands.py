"""The commands of the core, registered through the same hook as the commands of plugins."""

from __future__ import annotations

from peftcore.plugin import Command, hookimpl
from peftcore_cli.commands import (
    chat,
    doctor,
    evaluate,
    export,
    generate,
    info,
    merge,
    methods,
    new_plugin,
    plan,
    plugins,
    predict,
    push,
    suggest,
    train,
)


@hookimpl
def peftcore_commands() -> list[Command]:
    """Return the commands of the core, in the order of `peftcore --help`."""
    return [
        Command("train", train.train, train.EXAMPLES),
        Command("eval", evaluate.evaluate, evaluate.EXAMPLES),
        Command("predict", predict.predict, predict.EXAMPLES),
        Command("generate", generate.generate, generate.EXAMPLES),
        Command("chat", chat.chat, chat.EXAMPLES),
        Command("merge", merge.merge, merge.EXAMPLES),
        Command("export", export.export, export.EXAMPLES),
        Command("push", push.push, push.EXAMPLES),
        Command("plan", plan.plan, plan.EXAMPLES),
        Command("suggest", suggest.suggest, suggest.EXAMPLES),
        Command("info", info.info, info.EXAMPLES),
        Command("methods", methods.methods, methods.EXAMPLES),
        Command("plugins", plugins.plugins, plugins.EXAMPLES),
        Command("new-plugin", new_plugin.new_plugin, new_plugin.EXAMPLES),
        Command("doctor", doctor.doctor, doctor.EXAMPLES),
    ]
