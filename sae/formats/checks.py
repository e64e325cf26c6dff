"""Reading what somebody else wrote: each file whole, each number checked, each fault one line that names the file.

Nothing here runs code from a file: safetensors, JSON and npz cannot carry any, and a pickle is read by torch's
restricted unpickler (weights_only) alone, which itself was broken below torch 2.10 (CVE-2025-32434, CVE-2026-24747).
"""

from __future__ import annotations

import math
import mmap
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import errors, files
from sae.errors import UserError, printable

AGAIN = "Copy the folder again."
_SAFE_TORCH = (2, 10)
_MOST, _LARGE_NUMBER = 1 << 40, 1e30
_DEFLATED = 1032
"""The most that deflate can shrink anything."""
_UNPACKED, _LARGE = 20, 1 << 26
"""An npz above _LARGE bytes that unpacks to more than so many times its size holds no weights: those hardly shrink."""


def count(where: Path, config: Mapping[str, Any], key: str, *, least: int = 1, most: int = _MOST) -> int:
    """A whole number from a config, `where` being its file."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{where}: {key} is {value!r}, expected a whole number, {least} to {most:,}. {AGAIN}")
    return value


def number(where: Path, config: Mapping[str, Any], key: str, *, positive: bool = False) -> float:
    """A number from a config that float32 can hold."""
    value = config.get(key)
    least = 1 / _LARGE_NUMBER if positive else -_LARGE_NUMBER
    if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= _LARGE_NUMBER:
        return float(value)
    what = "a number above 0" if positive else "a finite number"
    raise UserError(f"{where}: {key} is {value!r}, expected {what}. {AGAIN}")


def flag(where: Path, config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} is {value!r}, expected true or false. {AGAIN}")
    return value


def text(config: Mapping[str, Any], key: str) -> str:
    """A text from a config, empty where there is none: of facts that nothing is computed from."""
    value = config.get(key)
    return value if isinstance(value, str) else ""


def safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, as they are on disk."""
    if not path.is_file():
        raise UserError(f"{path}: is missing. {AGAIN}")
    try:
        return files.read_safetensors(path)[0]
    except UserError as error:
        raise UserError(f"{path}: is damaged ({first_line(error.__cause__ or error)}). {AGAIN}") from error


def npz(path: Path) -> dict[str, Tensor]:
    """All arrays of an npz file. One that holds Python objects is refused unread, and one that says that it holds more
    than it does before any memory is taken for that."""
    import numpy as np

    try:
        _weigh(path)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing. {AGAIN}") from error
    except Exception as error:  # whatever a damaged archive makes zipfile, zlib and numpy raise
        raise UserError(f"{path}: is no npz of numbers, or a damaged one ({first_line(error)}). {AGAIN}") from error


def _weigh(path: Path) -> None:
    """Raise ValueError for an npz that declares more than it has, at each of its three levels, or Python objects."""
    from numpy.lib import format as npy

    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        packed, unpacked = sum(one.compress_size for one in members), sum(one.file_size for one in members)
        if packed > size or unpacked > max(_LARGE, _UNPACKED * size):
            raise ValueError(f"{size:,} bytes that say they unpack to {unpacked:,}")
        for one in members:
            if one.file_size > one.compress_size * (1 if one.compress_type == zipfile.ZIP_STORED else _DEFLATED):
                raise ValueError(f"{one.filename} says that it unpacks to {one.file_size:,} bytes")
            with archive.open(one) as file:
                first = npy.read_magic(file) == (1, 0)
                shape, _, dtype = (npy.read_array_header_1_0 if first else npy.read_array_header_2_0)(file)
                if dtype.hasobject:
                    raise ValueError(f"{one.filename} holds Python objects")
                if math.prod(shape) * dtype.itemsize != one.file_size - file.tell():
                    raise ValueError(f"{one.filename} says that it is {shape} of {dtype}, which it is not")


def pickled(path: Path, *, trust_pickle: bool = False) -> Any:
    """What torch.save wrote, tensors and plain containers only. Never runs what a file asks to run.

    Raises UserError for anything else in it, and below torch 2.10 unless `trust_pickle` says that the file is safe.
    """
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if (version is None or (int(version[1]), int(version[2])) < _SAFE_TORCH) and not trust_pickle:
        raise UserError(
            f"{path}: is a pickle, and torch {torch.__version__}'s guard against code in one can be broken. "
            "Update to torch 2.10; or, where you trust its author, run `sae convert --trust-pickle` on it "
            "(SAE.load(…, trust_pickle=True))."
        )
    if not path.is_file():
        raise UserError(f"{path}: is missing. {AGAIN}")
    try:
        _weigh_pickle(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than tensors, and was not loaded ({blocked(error)}). Ask its author for safetensors."
        ) from error
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise UserError(f"{path}: is no file of torch.save, or a damaged one ({first_line(error)}). {AGAIN}") from error


_UNBOUNDED = re.compile(
    rb"c(?:builtins|__builtin__)\n(?:bytearray|set)\n|ccollections\nCounter\n|c_codecs\nencode\n|ctorch\nSize\n"
)
"""What torch's unpickler would call, that makes as much of a number or a view as that says."""


def _weigh_pickle(path: Path) -> None:
    """Raise for a file of torch.save that unpacks to more than it has, and for what is none."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # as torch tells them
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _bounded(content)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(one.filename.endswith("/constants.pkl") for one in members):
            raise pickle.UnpicklingError("a program of TorchScript")
        # torch.save stores as it is, one after the other
        if any(one.compress_type != zipfile.ZIP_STORED or one.file_size != one.compress_size for one in members):
            raise ValueError("its members are compressed")
        if (unpacked := sum(one.file_size for one in members)) > path.stat().st_size:
            raise ValueError(f"{path.stat().st_size:,} bytes that say they unpack to {unpacked:,}")
        for one in members:
            if one.filename.endswith("data.pkl"):
                _bounded(archive.read(one))


def _bounded(content: bytes | mmap.mmap) -> None:
    if found := _UNBOUNDED.search(content):
        raise pickle.UnpicklingError(f"Unsupported: {found[0][1:].decode().strip().replace(chr(10), '.')}")


def blocked(error: Exception) -> str:
    """What torch's restricted unpickler stumbled over, from its page of advice."""
    lines = [line.strip() for line in str(error).splitlines() if "Unsupported" in line or "WeightsUnpickler" in line]
    if not lines:
        return first_line(error)
    # without what it says of how to run it all the same
    return printable(lines[0].removeprefix("WeightsUnpickler error: ").split(". Please")[0][:160])


def first_line(error: BaseException) -> str:
    return errors.first_line(error).split(" In PyTorch 2.6")[0]


def named(path: Path, given: Any) -> dict[str, Tensor]:
    """A state dict: a mapping of names to tensors, each of them plain and no larger than the file that it came from.

    A pickle may also hold sparse, quantised or empty (meta) ones, and views of any size over a few bytes.
    """
    if not isinstance(given, Mapping) or not all(isinstance(one, Tensor) for one in given.values()):
        raise UserError(f"{path}: holds {type(given).__name__}, expected tensors by name. {AGAIN}")
    for name, tensor in given.items():
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.is_quantized or tensor.device.type != "cpu" or tensor.nbytes > path.stat().st_size:
            raise UserError(
                f"{path}: {name} is no plain tensor of what the file holds. Ask its author for safetensors."
            )
    return {str(name): tensor.detach() for name, tensor in given.items()}


def nothing_else(path: Path, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises UserError for a tensor that the layout does not have: what it does to codes is not known."""
    if unknown := sorted(set(given) - set(known)):
        raise UserError(f"{path}: has {', '.join(unknown)[:160]} besides, which is not read. Choose another SAE.")


def taken(
    path: Path, given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], said: str
) -> dict[str, Tensor]:
    """The tensors of these names, in float32. Raises UserError where one is missing, or not of its shape.

    said   what gives the shapes, for the message: "cfg.json says"
    """
    found = {}
    for name, shape in shapes.items():
        tensor = given.get(name)
        if tensor is None or tuple(tensor.shape) != shape:
            what = "missing" if tensor is None else str(tuple(tensor.shape))
            raise UserError(f"{path}: {name} is {what}, {said} {shape}. {AGAIN}")
        if not (tensor.is_floating_point() or tensor.dtype in (torch.int32, torch.int64)):
            raise UserError(f"{path}: {name} is {str(tensor.dtype).removeprefix('torch.')}, expected numbers. {AGAIN}")
        found[name] = tensor.to(torch.float32)
    return found


def sound(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors. Raises UserError for a value that is not finite (a threshold may be infinite)."""
    for name, tensor in tensors.items():
        if bool(tensor.sum().isfinite()):  # so is every summand, and this reads no second mask of the matrix's size
            continue
        wrong = tensor.isnan() | (tensor == -torch.inf) if name == "threshold" else ~tensor.isfinite()
        if bool(wrong.any()):
            at = ", ".join(str(int(i)) for i in wrong.nonzero()[0])
            raise UserError(
                f"{path}: {name}[{at}] is {float(tensor[tuple(wrong.nonzero()[0])]):g} ({int(wrong.sum()):,} such), "
                f"expected finite numbers. {AGAIN}"
            )
    return dict(tensors)
