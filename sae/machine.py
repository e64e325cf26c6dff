"""What this machine is good at: device, number format and threads, by its flags and never by a timing.

A timing would change results from run to run; the flags of one kind of machine are always the same. bfloat16
where the processor multiplies it in hardware (CUDA from Ampere on, CPUs with avx512_bf16 or amx), float32 on
the rest and on Apple's MPS. The choice is printed and kept with every run; a `dtype=` given by the user wins.
"""

import platform

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
    if name not in DTYPES:
        raise UserError(f"dtype: {name!r} is not one of {', '.join(DTYPES)}, auto. Give one of these.")
    return DTYPES[name]


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
