"""A folder that may be anywhere: on this machine, or wherever fsspec reaches (s3://, gs://, memory://, simplecache::…).

Promise: one face for all of them. Files are written whole or not at all: locally as `files` does (fsync and rename),
elsewhere as object stores do (an object appears when it is complete). Reading is by byte ranges, several at once where
the file system can. Whatever a disk or a network refuses is one line that names the file as the user wrote the folder.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae import files
from sae.errors import UserError, first_line

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


class Place:
    """One folder; names in it have no slashes."""

    def __init__(self, url: str | Path):
        import fsspec

        self.url = str(url).rstrip("/") or "/"
        protocol = self.url.partition("::")[0].partition("://")[0] if "://" in self.url else "file"
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            package = _PACKAGES.get(protocol, protocol)
            raise UserError(f"{self.url}: {protocol}:// needs {package}. Run: pip install {package}") from error
        except ValueError as error:
            raise UserError(f"{self.url}: not a folder that fsspec knows ({error}). Check the address.") from error
        self.local = Path(self.root) if "file" in _protocols(self.fs) else None

    def __str__(self) -> str:
        return self.url

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def named(self, name: str) -> str:
        """A file as the user would write it."""
        return f"{self.url}/{name}"

    @contextlib.contextmanager
    def _explained(self, name: str, doing: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except FileNotFoundError as error:
            raise UserError(f"{self.named(name)}: no such file. Check the path.") from error
        except NotADirectoryError as error:
            raise UserError(f"{self.url}: a file stands where a folder is needed. Choose another path.") from error
        except Exception as error:  # each file system raises the errors of its own library
            reason = first_line(error)
            raise UserError(f"{self.named(name)}: cannot be {doing} ({reason}). Check the place and go on.") from error

    def names(self) -> list[str]:
        """Names of the files and folders in it; empty where it does not exist."""
        if self.local is not None:
            return sorted(path.name for path in self.local.iterdir()) if self.local.is_dir() else []
        with self._explained("", "listed"):
            self.fs.invalidate_cache()  # others may have written meanwhile
            try:
                return sorted(path.rstrip("/").rpartition("/")[2] for path in self.fs.ls(self.root, detail=False))
            except FileNotFoundError:
                return []

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        with self._explained(name, "read"):
            try:
                return int(self.fs.size(self.path(name)))
            except FileNotFoundError:
                return None

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def read(self, name: str) -> bytes:
        with self._explained(name, "read"):
            return self.fs.cat_file(self.path(name))

    def ranges(
        self, name: str, spans: Sequence[tuple[int, int]], memory: Callable[[int], bytearray] = bytearray
    ) -> list[bytearray]:
        """The bytes from start to end of each span, fewer where the file ends before.

        memory   gives the memory for so many bytes; a reader of many pieces hands out the same again and again
        """
        starts, ends = zip(*spans, strict=True)
        with self._explained(name, "read"):
            if self.local is not None:
                return [_piece(self.path(name), start, memory(end - start)) for start, end in spans]
            found = self.fs.cat_ranges([self.path(name)] * len(spans), list(starts), list(ends), on_error="raise")
            return [bytearray(data) for data in found]

    def write(self, name: str, blocks: files.Blocks) -> None:
        """Write a file whole or not at all."""
        if self.local is not None:
            files.write_blocks(self.local / name, blocks)
            return
        with self._explained(name, "written"):
            files.write_object(self.fs, self.path(name), blocks)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.write(name, [files.json_text(value).encode("utf-8")])

    def read_json(self, name: str, required: Sequence[str] = ()) -> dict[str, Any]:
        """A JSON object that has the `required` keys; anything else is a UserError."""
        value = files.json_value(self.read(name), self.named(name))
        if not isinstance(value, dict):
            raise UserError(f"{self.named(name)}: holds {type(value).__name__}, not a JSON object. Write it again.")
        if missing := [key for key in required if key not in value]:
            raise UserError(f"{self.named(name)}: has no {missing[0]!r}. Write it again.")
        return value

    def remove(self, name: str) -> None:
        """Remove a file; nothing where there is none."""
        with self._explained(name, "removed"), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def free(self) -> int | None:
        """Bytes that can still be written, None where nobody knows."""
        if self.local is None:
            return None
        at = self.local
        while not at.exists():
            at = at.parent
        return shutil.disk_usage(at).free

    def sweep(self, older_than: float = 0.0) -> None:
        """Remove what killed writers left so many seconds ago; 0 only while nobody else writes here."""
        if self.local is not None:
            files.sweep(self.local, older_than)


def _piece(path: str, start: int, memory: bytearray) -> bytearray:
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        with memoryview(memory) as view:
            at = 0
            while at < len(view) and (n := file.readinto(view[at:])):
                at += n
    return memory if at == len(memory) else memory[:at]


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
