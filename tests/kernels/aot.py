"""Compile the Triton kernels for cards that are not there, exactly as their wrappers would launch them.

Triton's driver is replaced by one that only names an architecture, and a launch by a compilation; the wrappers then run
on tensors without memory (device "meta") of any shape. What comes out is machine code, of which the bundled cuobjdump
tells registers, shared memory and spills. Used by test_triton_compile.py and experiments/bench/compile_report.py.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from sae.codes import from_topk
from sae.kernels import Adam, EveryRow, RowGradients, Rule, TopK, Work
from sae.kernels.by_feature import ByFeature
from sae.kernels.triton import product as product_page
from sae.kernels.triton import tuned
from sae.kernels.triton.decode import decode
from sae.kernels.triton.encode_select import encode_select
from sae.kernels.triton.reconstruct import reconstruct
from sae.kernels.triton.update_rows import update_rows

Shape = tuple[int, int, int, int]
SHAPES: dict[str, Shape] = {
    "A": (4096, 768, 24576, 32),
    "B16": (4096, 2304, 16384, 64),
    "B32": (4096, 2304, 32768, 64),
    "B65": (4096, 2304, 65536, 64),
    "B131": (4096, 2304, 131072, 64),
    "C": (8192, 4096, 131072, 64),
    "wide": (1024, 576, 1048576, 32),
    "many": (1024, 1152, 65536, 128),
    "broad": (2048, 8192, 65536, 64),
}
"""B, d, F, k: those of the benchmark, a million features, rows with many entries, a very wide host."""

SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that one program may use (CUDA C++ programming guide, table of compute capabilities)."""


@dataclass(frozen=True)
class Compiled:
    """One kernel's cost on one architecture; every figure of a thread or a program, in the units cuobjdump gives."""

    kernel: str
    arch: int
    warps: int
    registers: int
    spills: int
    """Instructions that read or write local memory, where what does not fit the registers goes."""
    shared: int
    wgmma: bool


@dataclass
class _Driver:
    """Names an architecture; there is no card. The device's number is the architecture, so that caches stay apart."""

    arch: int

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiling(arch: int):
    """While open, a launch only compiles; gives the list of (kernel's name, compiled kernel) as it grows."""
    made: list[tuple[str, triton.compiler.CompiledKernel]] = []
    run, active = JITFunction.run, triton.runtime.driver._active

    def compiles(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        made.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compiles
    triton.runtime.driver.set_active(_Driver(arch))
    try:
        yield made
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = active


def compile_all(arch: int, shape: Shape, calls: list[str] | None = None) -> list[Compiled]:
    """Every kernel that a step of `shape` launches, or those of some CALLS; each variant once."""
    with compiling(arch) as made:
        for name in calls or CALLS:
            CALLS[name](shape, torch.bfloat16 if has_bfloat16(arch) else torch.float32)
    unique = {kernel.hash: (name.lstrip("_"), kernel) for name, kernel in made}
    return sorted((_measured(name, arch, kernel) for name, kernel in unique.values()), key=lambda c: c.kernel)


def has_bfloat16(arch: int) -> bool:
    """Older cards multiply float32 by cuBLAS (sae/machine.py); there is no fused product for them."""
    return arch >= 80


def _measured(name: str, arch: int, kernel) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        registers = re.findall(r"REG:(\d+)", _cuobjdump("--dump-resource-usage", cubin))
        spills = re.findall(r"\b(?:LDL|STL)\b", _cuobjdump("--dump-sass", cubin))
    metadata = kernel.metadata
    wgmma = "wgmma" in kernel.asm["ptx"]
    return Compiled(name, arch, metadata.num_warps, int(registers[0]), len(spills), metadata.shared, wgmma)


def _cuobjdump(what: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, what, cubin], capture_output=True, text=True, check=True).stdout


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _codes(shape: Shape):
    B, _, F, k = shape
    return from_topk(empty(B, k), empty(B, k, dtype=torch.int64), F)


def _select(shape: Shape, low: torch.dtype, *, library: bool, floor: bool = False) -> None:
    B, d, F, k = shape
    if not library and low == torch.float32:
        return
    x, encoder, b_enc = empty(B, d), empty(F, d, dtype=low), empty(F)
    page = tuned.table()["product"]
    kept = page.copy()
    page |= {arch: [entry | {"library": library} for entry in entries] for arch, entries in kept.items()}
    try:
        if floor:
            next(product_page.chunks(x, encoder, b_enc, empty(F)))
        else:
            encode_select(x, encoder, b_enc, TopK(k))
    finally:
        page |= kept


def _decode(shape: Shape, low: torch.dtype) -> None:
    for dtype in (torch.float32, low):
        decode(_codes(shape), empty(shape[2], shape[1], dtype=dtype), empty(shape[1], dtype=dtype))


def _reconstruct(shape: Shape, low: torch.dtype, *, levels: int = 1) -> None:
    B, d, F, _ = shape
    ends = tuple(F >> (levels - 1 - level) for level in range(levels))
    reconstruct(_codes(shape), empty(F, d), empty(d), empty(B, d), ends, (1.0,) * levels)


def _update(shape: Shape, low: torch.dtype, *, lazily: bool = False, everything: bool = False) -> None:
    B, d, F, k = shape
    codes = _codes(shape)
    nnz, integers = B * k, torch.int64
    extra = every = None
    ends = (F // 2, F) if everything else (F,)
    if everything:
        extra = RowGradients(empty(512, dtype=integers), empty(512, d), empty(512, d), empty(512))
        every = EveryRow(empty(F), empty(F), empty(d))
    work = Work(codes, empty(B, d), empty(len(ends), B, d), empty(nnz), ends, True, extra, every)
    moments = tuple(
        Adam(None if lazily else empty(F, d), empty(F, d), 1, empty(F, dtype=torch.int32) if lazily else None)
        for _ in range(2)
    )
    transposed = ByFeature(empty(nnz, dtype=integers), empty(nnz, dtype=integers), empty(F + 1, dtype=integers))
    rule = Rule(1e-3, (0.0 if lazily else 0.9, 0.999))
    update_rows(empty(F, d), empty(F, d), empty(F, d, dtype=low), moments, work, transposed, rule)


def _call(function: Callable[..., None], **options) -> Callable[[Shape, torch.dtype], None]:
    return lambda shape, low: function(shape, low, **options)


CALLS: dict[str, Callable[[Shape, torch.dtype], None]] = {
    "topk": _call(_select, library=True),
    "topk fused": _call(_select, library=False),
    "above": _call(_select, library=True, floor=True),
    "above fused": _call(_select, library=False, floor=True),
    "decode": _decode,
    "reconstruct": _reconstruct,
    "reconstruct levels": _call(_reconstruct, levels=5),
    "update": _update,
    "update lazily": _call(_update, lazily=True),
    "update everything": _call(_update, everything=True),
}
"""What one can ask of the kernels, by name; each compiles what it launches."""
