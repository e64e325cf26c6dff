"""What this machine is good at: device, number format and threads, by its flags and never by a timing.

A timing would change results from run to run; the flags of one kind of machine are always the same. bfloat16
where the processor multiplies it in hardware (CUDA from Ampere on, CPUs with avx512_bf16 or amx), float32 on
the rest and on Apple's MPS. The choice is printed and kept with every run; a `dtype=` given by the user wins.
"""

import platform
from pathlib import Path

import torch

from sae.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def best_device() -> torch.device:
    """cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def device_of(name: str | torch.device = "auto") -> torch.device:
    """The device that `name` (cpu, cuda, cuda:1, mps, auto) means here; a UserError when it is not there."""
    if name == "auto":
        return best_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: {name!r} is not a device. Give cpu, cuda, mps or auto.") from error
    missing = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise UserError(f"device: this machine has no {device.type}. Give cpu or auto.")
    return device


def cpu_has_bf16() -> bool:
    """Whether the processor has instructions for bfloat16 products (avx512_bf16 or amx)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(check() for name in checks if (check := getattr(torch.cpu, name, None)) is not None)


def machine_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 where `device` multiplies it in hardware, else float32."""
    kind = torch.device(device).type
    if kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if kind == "cpu" and cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


def dtype_of(name: str | torch.dtype, device: str | torch.device = "cpu") -> torch.dtype:
    """The format that `name` (float32, bfloat16, float16, auto) means on `device`."""
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        return machine_dtype(device)
    known = DTYPES.get(str(name).removeprefix("torch."))  # SAELens writes torch.float32 too
    if known is None:
        raise UserError(f"dtype: {name!r} is not one of {', '.join(DTYPES)}, auto. Give one of these.")
    return known


def threads() -> int:
    """Threads that torch computes with on the CPU."""
    return torch.get_num_threads()


def describe() -> str:
    """One line on this machine, for run folders and benchmark tables."""
    bf16 = "bf16" if cpu_has_bf16() else "no bf16"
    cpu = f"{_cpu_name()} ({bf16}), {threads()} threads, torch {torch.__version__}"
    return f"{torch.cuda.get_device_name()}, {cpu}" if torch.cuda.is_available() else cpu


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def free_memory() -> int | None:
    """Bytes of main memory that this process may still take: what the system has, within the limits of the process and
    of its container; None where the system does not say."""
    found = [_meminfo("MemAvailable"), _left_of_container(), _left_of_address_space()]
    known = [one for one in found if one is not None]
    return min(known) if known else None


def _meminfo(name: str) -> int | None:
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
    except OSError:  # not Linux
        return None


def _left_of_container() -> int | None:
    """By cgroup v2, where the limit is of this process's own group; its file cache can be taken back."""
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8").strip().rpartition(":")[2].strip("/")
        folder = Path("/sys/fs/cgroup") / group
        limit = (folder / "memory.max").read_text(encoding="utf-8").strip()
        if limit == "max":
            return None
        used = int((folder / "memory.current").read_text(encoding="utf-8"))
        facts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        return int(limit) - used + int(facts.get("inactive_file", 0)) + int(facts.get("active_file", 0))
    except (OSError, ValueError):
        return None


def _left_of_address_space() -> int | None:
    """By RLIMIT_AS (`ulimit -v`)."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit == resource.RLIM_INFINITY:
            return None
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        return limit - pages * resource.getpagesize()
    except (ImportError, OSError, ValueError):  # Windows has none, macOS no /proc
        return None
