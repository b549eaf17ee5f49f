"""setup.py as a module, whose functions can be tried without building anything."""

import importlib.util
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]


def setup_file() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_file_of_peftcore", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    return module
