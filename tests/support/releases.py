"""Releases of transformers and PyTorch that tests tell apart."""

import torch
import transformers
from packaging.version import Version

BEFORE_5_24 = Version(transformers.__version__) < Version("5.24")
TORCH_2_9 = Version(torch.__version__) < Version("2.10")
