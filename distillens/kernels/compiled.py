"""C++ that is compiled on first use and kept: some seconds a source, once a machine.

A library lies in the user's cache folder under a name made from the source, the compiler and the processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import cast

# Sums may be taken in any order, which the compiler settles once: not-a-number stays what it is.
FLAGS = (
    "-O2",
    "-std=c++17",
    "-ftree-vectorize",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fopenmp",
    "-fPIC",
    "-shared",
)


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """What a source compiles to, loaded; None where there is no compiler that makes it."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or sys.platform == "win32":
        return None
    try:
        path = _compiled(compiler, source)
        # torch has loaded the OpenMP library by now: the kernels share its threads, and their number.
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def function(source: Path, name: str, pointers: int, sizes: int, numbers: int = 0) -> Callable[..., None]:
    """What a library calls ``name``: it takes so many pointers, integers and numbers."""
    found = library(source)
    assert found is not None, "asked for without a look at what is available"
    taken = getattr(found, name)
    taken.restype = None
    taken.argtypes = [
        *[ctypes.c_void_p] * pointers,
        *[ctypes.c_int64] * sizes,
        *[ctypes.c_double] * numbers,
    ]
    return cast("Callable[..., None]", taken)


def _compiled(compiler: str, source: Path) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    parts = (sources(), " ".join(FLAGS).encode(), version, processor().encode())
    name = f"{source.stem}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:32]}.so"
    path = folder() / name
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / name
            command = [compiler, *FLAGS, str(source), "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True, timeout=300)
            made.replace(path)
    return path


def sources() -> bytes:
    """All that is compiled here: a source may include its neighbours."""
    here = Path(__file__).parent
    return b"".join(one.read_bytes() for one in sorted([*here.glob("*.cpp"), *here.glob("*.h")]))


def processor() -> str:
    """What the compiler's ``native`` stands for: a cache folder may be shared by machines that differ."""
    flags = ""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"


def folder() -> Path:
    """A cache folder that is nobody else's: what lies there is run."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distillens"
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(base, os.W_OK):
            return base
    except OSError:
        pass
    return Path(_session_folder().name)


@cache
def _session_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="distillens-kernels-")
