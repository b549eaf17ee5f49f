"""Fixtures that compile the .cu files for the emulator and run their launchers."""

import ctypes
import os
import platform
import subprocess

import pytest
import torch
from emulator import building, products
from emulator.building import FLAGS, HERE, ROOT, SIMD, compile_emulated

SANITIZE = " -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"


def compiler():
    found = building.compiler()
    if found is None:
        pytest.skip("no g++")
    return found


class Emulated:
    """Launchers by name, as functions that raise RuntimeError with the launcher's message, and their workspaces."""

    def __init__(self, library):
        self.library = library

    def __call__(self, name):
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p

        def call(*args, seed=0, tickets=True):
            self.library.emulator_seed(ctypes.c_uint64(seed))
            error = function(*map(passed, args), ctypes.c_void_p(None if tickets else 1))  # the stream
            if error is not None:
                raise RuntimeError(error.decode())

        return call

    def launches(self):
        """Return the number of launches so far."""
        self.library.emulator_launches.restype = ctypes.c_uint64
        return self.library.emulator_launches()

    def tickets(self):
        """Return the counters that launches share (csrc/common/cuda_tickets.h)."""
        function, count = self.library.peftcore_tickets, 512
        function.restype = ctypes.POINTER(ctypes.c_uint * count)
        return list(function(count, None).contents)

    def workspace(self, name, *args):
        """Return a workspace of exactly as many floats as the function `name` returns."""
        function = getattr(self.library, name)
        function.restype = ctypes.c_int64
        return torch.full((function(*map(passed, args)),), torch.nan)


def passed(value):
    """Return the value as a C argument: tensors and structs by address."""
    if hasattr(value, "data_ptr"):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p()
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    return value


@pytest.fixture(scope="session")
def emulated_library():
    """Return a library of the kernels in csrc and of the toy kernels."""
    return ctypes.CDLL(str(building.library_of_kernels(compiler())))


@pytest.fixture(scope="session")
def emulated(emulated_library):
    return Emulated(emulated_library)


@pytest.fixture(params=["known", "read by the kernel"])
def seed(request, monkeypatch):
    """Let launches know dropout's seed, or read it from memory; return the tensor."""
    in_memory = torch.tensor(products.SEED)
    monkeypatch.setattr(products, "SEED_IN_MEMORY", None if request.param == "known" else in_memory)
    return in_memory


@pytest.fixture(scope="session")
def sanitized():
    """Return a function that runs tests/emulator/sanitized.cpp under Address- and UndefinedBehaviorSanitizer."""
    sources = [*sorted(ROOT.glob("csrc/**/*.cu")), HERE / "toys.cu", *sorted(HERE.glob("sanitized*.cpp"))]
    sources += [*sorted(ROOT.glob("csrc/quant4/cpu/[ap]*.cpp")), *sorted(ROOT.glob("csrc/optim/cpu/[ap]*.cpp"))]
    sources += [ROOT / "csrc" / "optim" / "dynamic8.cpp"]
    flags = FLAGS + SANITIZE
    if platform.machine() in ("x86_64", "AMD64"):
        flags += " -DPEFTCORE_HAVE_AVX2 -DPEFTCORE_HAVE_AVX512"
    else:
        sources = [path for path in sources if path.stem not in SIMD]
    binary = compile_emulated(compiler(), "sanitized", sources, flags, "-lm")

    def run(*args):
        # Fake stacks for every fiber would cost ten times the run.
        options = {
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=0",
        }
        return subprocess.run([binary, *map(str, args)], env={**os.environ, **options}, capture_output=True, text=True)

    return run
