"""Ctrl-C and SIGTERM ask for an end at the next moment at which nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sae.errors import Stopped


class Asked(BaseException):
    """A signal came while waiting; nothing had begun that must be ended. No Exception: as KeyboardInterrupt is none,
    so that nobody's fallback swallows it."""


class Stop:
    """`number` is the signal that asked, 0 while none did."""

    def __init__(self):
        self.number = 0
        self._waits = False

    def ask(self, number: int, frame: object) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        if self._waits:
            raise Asked

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises Asked where the program is: for waiting, which may take minutes."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False


@contextmanager
def ended_by_signal(told: str) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM end the command where it is, as Stopped: for work that keeps what it has done."""
    with stop_signals() as stop:
        try:
            with stop.at_once():
                yield
        except Asked:
            raise Stopped(told, 128 + stop.number) from None


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM are noted in what this yields; a second SIGINT stops at once. Only in the main thread."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
