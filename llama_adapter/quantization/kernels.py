"""Compiled products with quantised matrices (kernels.cpp), built by the machine's own C++ compiler.

They are compiled once, in a few seconds, for this machine's processor, and kept in the user's cache folder.
Without a compiler, `load_kernels` returns None, and callers compute with torch, slowly.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from llama_adapter.common.files import write_atomically
from llama_adapter.weights.locations import cache_folder

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("c++", "g++", "clang++")
OPTIMISATION = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
# Options for this processor and for threads. They are tried in this order until the compiler accepts them.
WISHES = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    ("-mcpu=native",),
    (),
)
_LOADING = threading.Lock()


class Matrix(ctypes.Structure):
    """A quantised (or float32) matrix: addresses of its tensors, which the caller keeps alive."""

    _fields_ = (
        ("format", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("numbers", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class Norm(ctypes.Structure):
    """A root-mean-square norm. Without a weight there is no norm."""

    _fields_ = (("weight", ctypes.c_void_p), ("epsilon", ctypes.c_double))


class Layer(ctypes.Structure):
    """The frozen parts of one layer."""

    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, Norm) for name in ("before_attention", "before_mlp", "of_queries", "of_keys")),
        ("scaling", ctypes.c_double),
    )


class Rows(ctypes.Structure):
    """A tensor of an adapter, and the distance from one row of the batch to the next."""

    _fields_ = (("start", ctypes.c_void_p), ("stride", ctypes.c_int64))


class More(ctypes.Structure):
    """Keys and values that belong to no token."""

    _fields_ = (
        ("keys", Rows),
        ("values", Rows),
        ("count", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("mask_stride", ctypes.c_int64),
    )


class Term(ctypes.Structure):
    """One thing that an adapter does at one site. kernels.cpp describes the fields."""

    _fields_ = (
        *((name, Rows) for name in ("scale", "bias", "down", "down_bias", "up")),
        *((name, ctypes.c_int64) for name in ("rank", "inputs", "outputs", "place", "reads_output", "gelu")),
    )


SITES = 9  # the projections and the two sub-layers


class Added(ctypes.Structure):
    """What an adapter adds to one layer."""

    _fields_ = (
        ("prompts", More),
        ("prefix", More),
        ("terms", ctypes.c_void_p),
        ("first", ctypes.c_int64 * (SITES + 1)),
    )


class Step(ctypes.Structure):
    """One token of every row. kernels.cpp describes the fields."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "threads", "heads", "key_heads", "head_dim", "hidden_size", "layers")
        ),
        ("length", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("starts", "cosines", "sines", "keys", "values", "added")),
        ("ranks", ctypes.c_int64),
        ("hidden", ctypes.c_void_p),
        ("last", Norm),
    )


@functools.lru_cache(maxsize=1)
def load_once() -> ctypes.CDLL | None:
    """As `load_kernels`, for one thread at a time."""
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:200]
        print(
            f"quantised products are computed by torch, slowly: no kernel could be compiled ({reason}); "
            "install a C++ compiler (g++ or clang++)",
            file=sys.stderr,
        )
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, arguments in (
        ("linear", (pointer, pointer, number, pointer, number)),
        ("dequantize", (pointer, number, number, pointer, number)),
        ("decode", (pointer, pointer)),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    if hasattr(library, "multiply_many"):
        library.multiply_many.argtypes = (pointer, pointer, number, pointer, number, number)
        library.multiply_many.restype = None
    return library


def load_kernels() -> ctypes.CDLL | None:
    """The compiled functions; None, with a line on standard error, if they can't be built.

    They are ``linear``, ``dequantize`` and ``decode`` of kernels.cpp, and on processors with AVX2 also
    ``multiply_many``. They release Python's lock while they compute.
    """
    with _LOADING:
        return load_once()


def kernel_folder() -> Path:
    """Where compiled kernels are kept."""
    return cache_folder() / "kernels"


def find_compiler() -> str | None:
    """The C++ compiler that $CXX names, else the first one there is; None where there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    return next((found for found in map(shutil.which, names) if found), None)


def _build() -> Path:
    """The file of the compiled library. It is compiled if it is not there.

    Raises:
        OSError: there is no compiler, or the folder can't be written.
        subprocess.SubprocessError: the compiler failed.
    """
    compiler = find_compiler()
    key = f"{SOURCE.read_text()} {_processor()} {OPTIMISATION} {WISHES}"
    target = kernel_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.is_file():
        return target
    if compiler is None:
        raise FileNotFoundError(f"no {', '.join(COMPILERS)} was found")
    target.parent.mkdir(parents=True, exist_ok=True)
    failure: subprocess.CalledProcessError | None = None
    with write_atomically(target) as temporary:
        for wishes in WISHES:
            command = [compiler, *OPTIMISATION, *wishes, "-o", str(temporary), str(SOURCE)]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=300)
                break
            except subprocess.CalledProcessError as error:
                failure = error
        else:
            assert failure is not None
            message = failure.stderr.decode(errors="replace").strip().splitlines() or [str(failure)]
            raise OSError(f"{compiler} failed: {message[0]}")
    return target


def _processor() -> str:
    """A description of what -march=native depends on: several machines may share a home folder."""
    described = Path("/proc/cpuinfo")  # Linux
    if described.is_file():
        lines = described.read_text(errors="replace").splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        return " ".join(sorted({line for line in lines if line.startswith(wanted)}))
    return f"{platform.platform()} {platform.processor()} {platform.machine()}"
