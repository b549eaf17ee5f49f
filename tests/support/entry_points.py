"""Entry points of plugins that are not installed."""

from importlib.metadata import EntryPoint


class Distribution:
    def __init__(self, name: str, version: str = "1.0") -> None:
        self.name, self.version = name, version


def entry(name: str, value: str, distribution: str) -> EntryPoint:
    entry_point = EntryPoint(name, value, "peftcore")
    vars(entry_point)["dist"] = Distribution(distribution)
    return entry_point
