"""Compile the C files beside this page with the system's compiler, once a machine, and call them.

Nothing is compiled at install time and no compiler is needed: without one, or when anything goes wrong, `native()` is
None and the kernels run on torch alone (slower, the same results within rounding). GOLDENGATE_NATIVE=0 asks for that.
The library lies in the cache folder under a hash of all that made it: sources, flags, compiler, processor.

The library is linked without an OpenMP runtime and finds the one that torch has loaded: threads of two pools would
spin against each other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from sae import files
from sae.errors import UserError

SOURCES, HEADERS = ("select.c", "reconstruct.c", "update.c"), ("simd.h", "rows.h")
# No -ffast-math: NaN and infinity mean what they mean. Sums are reordered only where a pragma in the source says so.
FLAGS = ("-O3", "-fPIC", "-fopenmp", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
# By what torch itself would use, so that ATEN_CPU_CAPABILITY holds for us too.
TARGETS = {
    "AVX512": ("-march=native", "-mprefer-vector-width=512"),
    "AVX2": ("-march=x86-64-v3",),
}

_log = logging.getLogger(__name__)


def native() -> ctypes.CDLL | None:
    """The library, compiled if need be; None where it is switched off or cannot be had."""
    return None if os.environ.get("GOLDENGATE_NATIVE") == "0" else _loaded()


def call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a C function: tensors go as the address of their data, whole numbers as int64, others as double."""
    library = native()
    assert library is not None, "ask native() first"
    getattr(library, name)(*map(_as_c, arguments), ctypes.c_int64(torch.get_num_threads()))


def _as_c(argument: Tensor | int | float | None):
    if argument is None:
        return ctypes.c_void_p()
    if isinstance(argument, Tensor):
        assert argument.is_contiguous() and argument.device.type == "cpu"
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


@functools.cache
def _loaded() -> ctypes.CDLL | None:
    compiler = shlex.split(os.environ.get("CC") or "cc")
    try:
        path = _library(compiler)
        if not path.exists():
            with files.atomic_file(path) as temporary:
                _compile(compiler, temporary)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip()
    except (OSError, UserError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    _log.debug("no native kernels, torch's are used: %s", reason)
    return None


def _library(compiler: list[str]) -> Path:
    """Where the library for these sources, this compiler and this processor lies."""
    version = _run([*compiler, "--version"])
    made_of = [version, *FLAGS, *_target(), platform.machine(), _processor()]
    folder = Path(__file__).parent
    made_of += [(folder / name).read_text(encoding="utf-8") for name in (*SOURCES, *HEADERS)]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    return files.cache_dir() / "native" / f"kernels-{digest}.so"


def _compile(compiler: list[str], target: Path) -> None:
    sources = [str(Path(__file__).with_name(name)) for name in SOURCES]
    with tempfile.TemporaryDirectory() as folder:
        _run([*compiler, *FLAGS, *_target(), "-c", *sources], folder)
        objects = [Path(name).with_suffix(".o").name for name in SOURCES]
        _run([*compiler, "-shared", "-o", str(target.absolute()), *objects, "-lm"], folder)


def _target() -> tuple[str, ...]:
    return TARGETS.get(torch.backends.cpu.get_cpu_capability(), ())


def _processor() -> str:
    """The processor's model and flags, because -march=native means another thing on another."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:  # not Linux
        return platform.processor()
    return "\n".join(line for line in text.splitlines() if line.startswith(("model name", "flags", "Features")))


def _run(command: list[str], folder: str | None = None) -> str:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=120).stdout
