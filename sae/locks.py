"""One writer at a time: a lock on a folder, by whatever name its writers agree on.

On a disk of this machine the operating system holds it, so that it ends with its process, however that ends. On object
stores it is a small object whose holder renews it every few seconds; one that was not renewed for a minute is taken
over, with a notice. That kind saves double work and is no proof against a race: whoever writes shards must still be
right when two do the same (they write the same bytes).
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from sae.errors import UserError
from sae.places import Place

logger = logging.getLogger("sae")
RENEWED_EVERY, STALE_AFTER = 10.0, 60.0  # seconds
_LOOKS = 8


class Held(UserError):
    """Another process holds the lock; says which, where and since when."""


@contextlib.contextmanager
def lock(place: Place, name: str) -> Iterator[None]:
    """Hold `name` in this folder while open; Held at once where another process does."""
    with _local(place, name) if place.local is not None else _lease(place, name):
        yield


def is_held(place: Place, name: str) -> bool:
    """Whether another process holds it now, and for longer than it takes to look (which takes it for a moment)."""
    for _ in range(_LOOKS):
        try:
            with lock(place, name):
                return False
        except Held:
            time.sleep(random.uniform(0.05, 0.3))
    return True


def held_names(place: Place) -> list[str]:
    """Names of which a lock is (or was, by a process that was killed) in this folder."""
    return sorted({name.removeprefix(".lock-").removesuffix(".json") for name in place.names() if _is_lock(name)})


def _is_lock(name: str) -> bool:
    return name.startswith(".lock-") and name.endswith(".json")


@contextlib.contextmanager
def _local(place: Place, name: str) -> Iterator[None]:
    from filelock import FileLock, Timeout

    assert place.local is not None
    path = place.local / f".lock-{name}"
    taken = FileLock(path)
    try:
        place.local.mkdir(parents=True, exist_ok=True)
        taken.acquire(timeout=0)
    except Timeout:
        raise _held(place, name) from None
    except OSError as error:
        raise UserError(f"{place}: cannot be written ({error.strerror}). Choose another folder.") from error
    try:
        place.write_json(_note(name), _self())
        yield
    finally:
        place.remove(_note(name))
        with contextlib.suppress(OSError):  # an open file cannot be removed on Windows
            path.unlink()
        taken.release()
        with contextlib.suppress(OSError):  # goes where nothing else was written
            place.local.rmdir()


@contextlib.contextmanager
def _lease(place: Place, name: str) -> Iterator[None]:
    note, mine = _note(name), _self()
    if (other := _read(place, note)) is not None and not _is_gone(other):
        raise _held(place, name)
    if other is not None:
        logger.warning("%s: taken over from process %s on %s, which is gone", place, other["pid"], other["machine"])
    place.write_json(note, mine)
    done = threading.Event()

    def renew() -> None:
        while not done.wait(RENEWED_EVERY):
            if not _is_mine(place, note, mine):
                logger.warning("%s: another process has taken it over while this one stood still", place)
                return
            with contextlib.suppress(UserError):  # tried again soon; the work itself will say what is wrong
                place.write_json(note, mine | {"renewed": time.time()})

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if _is_mine(place, note, mine):
            place.remove(note)


def _is_mine(place: Place, note: str, mine: dict[str, Any]) -> bool:
    there = _read(place, note)
    return there is None or all(there[key] == mine[key] for key in ("pid", "machine", "since"))


def _note(name: str) -> str:
    return f".lock-{name}.json"


def _self() -> dict[str, Any]:
    now = time.time()
    return {"pid": os.getpid(), "machine": socket.gethostname(), "since": now, "renewed": now}


def _read(place: Place, note: str) -> dict[str, Any] | None:
    try:
        return place.read_json(note, ("pid", "machine", "since", "renewed"))
    except UserError:  # gone, or half a note of a killed writer
        return None


def _is_gone(holder: dict[str, Any]) -> bool:
    if holder["machine"] == socket.gethostname() and not _lives(holder["pid"]):
        return True
    return time.time() - holder["renewed"] > STALE_AFTER


def _lives(pid: int) -> bool:
    if os.name == "nt":  # there, signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _held(place: Place, name: str) -> Held:
    holder = _read(place, _note(name))
    if holder is None:
        return Held(f"{place}: another process is writing it ({name}). Wait until it has ended.")
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
    return Held(
        f"{place}: process {holder['pid']} on {holder['machine']} has been writing it since {since} ({name}). "
        "Wait until it has ended, or stop it."
    )
