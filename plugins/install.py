"""Install peftcore and plugins as editable packages: python plugins/install.py ".[train]" plugins/peftcore-lora ...

`pip install -e` starts Python and imports setuptools three times for each package, 40 seconds for all of them. Here one
process imports setuptools once and builds each wheel in a fork, and pip only unpacks the wheels, with peftcore,
the extras of the first argument and what plugins need.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import warnings
from functools import partial

from setuptools import build_meta  # type: ignore[import-untyped]


def wheel(target: str, package: str) -> str:
    """Build the package's editable wheel in the folder `target`, and return its path."""
    os.chdir(package)
    logging.disable()  # setuptools names each file that it writes, and warns that a package is editable
    warnings.simplefilter("ignore")
    return os.path.join(target, build_meta.build_editable(target))


if __name__ == "__main__":
    peftcore, *packages = sys.argv[1:2] + [os.path.abspath(package) for package in sys.argv[2:]]
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
    with tempfile.TemporaryDirectory() as target:
        with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
            wheels = pool.map(partial(wheel, target), packages, chunksize=1)
        # pip looks for peftcore in the index where it was only given with extras.
        subprocess.run([*pip, "--no-build-isolation", "-e", ".", "-e", peftcore, *wheels], check=True)
        # pip keeps an installed package of the same version, whatever has changed in its pyproject.toml.
        subprocess.run([*pip, "--quiet", "--no-deps", "--force-reinstall", *wheels], check=True)
