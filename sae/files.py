"""The only writer: nothing else in sae/ opens a file for writing (tested).

Files and folders appear whole or not at all: a temporary sibling is written, fsynced and renamed, then the
parent is fsynced. A failed write leaves the previous content. So does a killed one, but for one moment:
replacing a folder takes two renames, and a kill between them leaves the old folder whole under a `.tmp-`
name and nothing at its own. Leftovers have names that start with `.tmp-`; no reader looks at them. Running
out of space is a UserError that names the path.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import struct
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sae.errors import UserError

_TEMPORARY = re.compile(r"\.tmp-([^/]+)-\d+-[0-9a-f]{8}")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_dir() -> Path:
    """The user's cache folder for us: `$SAE_CACHE`, else the platform's (`~/.cache/goldengate-sae`)."""
    if folder := os.environ.get("SAE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "goldengate-sae"


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line that names the path, as it will be called."""
    try:
        yield
    except OSError as error:
        path = Path(_TEMPORARY.sub(r"\1", str(path)))
        if error.errno in _NO_SPACE:
            free = shutil.disk_usage(existing_parent(path)).free
            raise UserError(
                f"{path}: no space left to write it ({free / 1e6:,.1f} MB free). Nothing was changed there; "
                "free some space or choose another folder."
            ) from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise UserError(f"{path}: not writable ({error.strerror}). Choose another folder.") from error
        if isinstance(error, NotADirectoryError | FileExistsError):
            raise UserError(f"{path}: a file stands where a folder is needed. Choose another path.") from error
        raise


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_folder(path: Path) -> None:
    """With its parents, each name of which is then on disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _fsync(folder.parent)


def _temporary(path: Path) -> Path:
    return path.parent / f".tmp-{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it becomes `path`, on any other it is gone.

    Raises UserError where `path` is there and is no regular file: a device or a pipe would be replaced by one.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file. Choose another path.")
    temporary = _temporary(path)
    with _explained(path):
        _make_folder(path.parent)
        try:
            yield temporary
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, marker: str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on a clean exit it replaces `path` as a whole.

    marker   a file that every folder of this kind has: `check_folder` refuses what it would not replace,
             before anything is written
    A link to a folder stays, and what it leads to is replaced.
    """
    path = Path(path)
    check_folder(path, marker)
    target = Path(os.path.realpath(path))
    temporary = _temporary(target)
    with _explained(path):
        _make_folder(target.parent)
        try:
            temporary.mkdir()
            yield temporary
            check_folder(path, marker)  # once more: filling the temporary folder may have taken long
            _take_name(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(folder: str | Path, path: str | Path, *, marker: str) -> None:
    """Give a finished folder beside `path` its name, in place of what is there; as `atomic_folder` does at its end."""
    check_folder(path, marker)
    with _explained(Path(path)):
        _take_name(Path(folder), Path(os.path.realpath(path)))


def _take_name(folder: Path, target: Path) -> None:
    for child in folder.rglob("*"):
        _fsync(child)
    _fsync(folder)
    if target.exists():
        old = _temporary(target)
        os.replace(target, old)
        try:
            os.replace(folder, target)
        except OSError:
            os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(folder, target)
    _fsync(target.parent)


def check_folder(path: str | Path, marker: str) -> None:
    """Refuse to replace what is not ours: a file, or a folder that is neither empty nor has `marker` in it."""
    path = Path(path)
    with _explained(path):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file, a folder is to be written there. Choose another path.")
        if path.is_dir() and not (path / marker).is_file() and any(path.iterdir()):
            raise UserError(f"{path}: is not empty and not ours to replace (no {marker} in it). Choose another folder.")


def write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, indented, whole or not at all. NaN and infinities are written as null."""
    # half of a surrogate pair is no UTF-8; as \\ud800 it is JSON
    write_bytes(path, json_text(value).encode("utf-8", "backslashreplace"))


def json_text(value: Any) -> str:
    """JSON as all our files have it: indented, NaN and infinities as null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def write_safetensors(path: str | Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write named tensors whole or not at all; views are made contiguous first."""
    from safetensors.torch import save_file

    with atomic_file(path) as temporary:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, temporary, metadata=metadata)
        except Exception as error:  # safetensors wraps the operating system's error in its own type
            if "No space left" in str(error) or "File too large" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise
        os.chmod(temporary, 0o644)


def write_torch(path: str | Path, tensors: Mapping[str, Any]) -> None:
    """Write named tensors as torch.save does, whole or not at all; views are made contiguous first. Held twice."""
    import torch

    buffer = io.BytesIO()  # torch's writer to a file would say of a full disk only that it failed
    torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, buffer)
    write_bytes(path, buffer.getbuffer())


def read_safetensors(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(tensors, metadata) of a file that is ours; a missing or damaged one is a UserError that names it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: missing or damaged ({error}). Delete it and go on from what was before it."
        ) from error


Blocks = Iterable[bytes | memoryview]


def safetensors_blocks(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The content of a safetensors file piece by piece, without a copy of the CPU tensors.

    Laid out as the library does, widest elements first and then by name, so that every tensor is aligned.
    """
    import torch

    kinds = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
             torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8"}  # fmt: skip
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    names, at = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)), 0
    for name in names:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        yield raw(tensors[name])


def raw(tensor: Any) -> memoryview:
    """The bytes of a CPU tensor; no copy where it is contiguous."""
    import torch

    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def write_blocks(path: str | Path, blocks: Blocks) -> None:
    """Write a file piece by piece, whole or not at all."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        for block in blocks:
            file.write(block)


def write_object(fs: Any, path: str, blocks: Blocks) -> None:
    """Write to a file system of fsspec that publishes an object when it is closed; a failure publishes nothing."""
    file = fs.open(path, "wb")
    try:
        for block in blocks:
            file.write(block)
    except BaseException:
        file.discard()
        raise
    file.close()


class Lines:
    """Append JSON objects to a file, one a line, each flushed: `metrics.jsonl` and resumable long jobs."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with _explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            drop_torn_tail(self.path)
            self._file = self.path.open("a", encoding="utf-8")

    def add(self, value: Mapping[str, Any]) -> None:
        """Append one object and flush it."""
        with _explained(self.path):
            self._file.write(json_line(value))
            self._file.flush()

    def sync(self) -> None:
        """Return when all lines are on disk, where a power loss leaves them."""
        with _explained(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line that `add` could not write, and has told
            self._file.close()


def json_line(value: Mapping[str, Any]) -> str:
    """One object as one line of JSON, with its newline."""
    return json.dumps(_finite(value), ensure_ascii=False) + "\n"


def drop_torn_tail(path: Path) -> None:
    """Cut a last line without its newline (the writer was killed in it)."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def read_lines(path: str | Path, required: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Read what `Lines` wrote; a torn last line is ignored. Any other that is not an object with the `required` keys is
    a UserError that names it."""
    # Newlines alone part lines: str.splitlines would also cut inside texts that hold U+2028, U+2029 or U+0085.
    whole = Path(path).read_bytes().split(b"\n")[:-1]
    return [_line(line, f"{path}, line {number:,}", required) for number, line in enumerate(whole, 1)]


def _line(data: bytes, where: str, required: Iterable[str]) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}). Mend or delete that line.") from error
    if not isinstance(value, dict) or any(key not in value for key in required):
        raise UserError(f"{where}: not an object with {', '.join(required)}. Mend or delete that line.")
    return value


LARGEST_JSON, _DEEPEST = 1 << 28, 100


def read_json(path: str | Path) -> Any:
    """Read JSON; a missing or broken file is a UserError that names it, and so is what is no file or without end."""
    path = Path(path)
    try:
        regular(path)
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise UserError(f"{path}: has {size:,} bytes, of JSON {LARGEST_JSON:,} are read. Write it again.")
        return json_value(path.read_bytes(), path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Check the path.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error


def regular(path: Path) -> None:
    """Raises UserError for a folder, a pipe or a device: reading one fails, waits, or never ends."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is {'a folder' if path.is_dir() else 'no regular file'}. Put the file there.")


def json_value(data: bytes, path: str | Path) -> Any:
    """JSON from the bytes of a file; a UserError that names it where they are none."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number too long, nested too deep
        raise UserError(f"{path}: not valid JSON ({error}). Write it again.") from error
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for one in level if isinstance(one, dict | list)
                 for inner in (one.values() if isinstance(one, dict) else one)]  # fmt: skip
    if level:  # copying or showing it would exceed Python's stack
        raise UserError(f"{path}: is nested more than {_DEEPEST} deep. Write it again.")
    return value


def read_json_object(path: str | Path, required: Iterable[str] = (), newest: int | None = None) -> dict[str, Any]:
    """Read a JSON object that has the `required` keys; anything else is a UserError.

    newest   the highest `format` that the caller reads; a higher one is refused before keys are looked for
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, not a JSON object. Write it again.")
    if newest is not None:
        number = value.get("format", 0)
        if not isinstance(number, int):
            raise UserError(f"{path}: format is {number!r}, not a number. Write it again.")
        if number > newest:
            raise UserError(
                f"{path}: format {number} is newer than this version reads ({newest}). Upgrade goldengate-sae."
            )
    for key in required:
        if key not in value:
            raise UserError(f"{path}: has no {key!r}. Write it again.")
    return value


def checksum(path: str | Path) -> str:
    """sha256 of a file, as hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sweep(folder: str | Path, older_than: float = 0.0) -> None:
    """Remove what killed writers left in a folder so many seconds ago."""
    for leftover in Path(folder).glob(".tmp-*"):
        with contextlib.suppress(FileNotFoundError):  # its writer renamed it meanwhile
            if time.time() - leftover.stat().st_mtime >= older_than:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def remove_file(path: str | Path) -> None:
    """Remove a file that we made."""
    Path(path).unlink(missing_ok=True)


def remove_folder(path: str | Path) -> None:
    """Remove a folder that we made. It loses its name first: half of it never looks like the whole."""
    path = Path(path)
    if not path.exists():
        return
    leftover = _temporary(path)
    with _explained(path):
        os.replace(path, leftover)
    shutil.rmtree(leftover, ignore_errors=True)
