"""Releases of transformers that tests tell apart."""

import transformers
from packaging.version import Version

BEFORE_5_24 = Version(transformers.__version__) < Version("5.24")
