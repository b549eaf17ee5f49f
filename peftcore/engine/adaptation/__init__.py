"""The one mechanism: a module's class is swapped for one whose forward runs adapters, and threads call it safely."""

from peftcore.engine.adaptation import wrapped  # noqa: F401  # it registers the format of other libraries' tensors
