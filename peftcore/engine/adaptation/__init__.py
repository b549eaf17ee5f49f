"""The one mechanism: a module's class is swapped for one whose forward runs adapters, and threads call it safely.

It imports `model` and what is below it, and nothing else of the engine. The class is swapped in adapted.py, whose
forward runs a chain (chain.py) under a lock (concurrency.py) that the ancestors take as well (enclosing.py). How ranks
share out a layer is in division.py, its forward in divided_forward.py; modules that one operator computes are in
fused_forward.py.
"""

from peftcore.engine.adaptation import wrapped  # noqa: F401  # it registers the format of other libraries' tensors
