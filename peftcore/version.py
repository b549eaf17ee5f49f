"""The installed version of peftcore."""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """Return the version of the installed package; "0" for a source tree that was never installed."""
    try:
        return version("peftcore")
    except PackageNotFoundError:
        return "0"
