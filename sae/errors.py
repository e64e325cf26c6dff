"""What a user, a file or a network can cause is a UserError: one line that says where, what is (with the
value), what was expected and what to do. The command line prints it and exits with 2; internal
impossibilities stay `assert` with a message."""

import re

ESCAPE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b.|\x9b[0-?]*[ -/]*[@-~]", re.DOTALL
)
"""CSI, OSC and other two-byte sequences that steer a terminal."""
_LONGEST, _ENDING = 400, 120
_PATH, _NAME = 4096, 255
"""What a path, and a name in one, can have at most."""


class UserError(Exception):
    """One line for the user; its last words are something to do.

    Values that files and other libraries put into it may be of any length and hold what steers a terminal: the text is
    one printable line in any case, shortened in its middle. What stands before the first ': ' stays whole where it can
    be a path.
    """

    def __init__(self, message: str = ""):
        super().__init__(_short(printable(message)))


class Stopped(Exception):
    """A long job ends before its end and has saved its state; the text says how to go on.

    code   the command's exit: 130 where the user asked for it, 0 where this process has done all of its own share
    """

    def __init__(self, message: str, code: int = 130):
        super().__init__(message)
        self.code = code


def printable(text: str) -> str:
    """The text as one line without what steers a terminal, '?' for whatever else is not printable."""
    line = " ".join(part.strip() for part in ESCAPE.sub("", text).splitlines() if part.strip())
    return "".join(letter if letter.isprintable() else " " if letter.isspace() else "?" for letter in line)


def first_line(error: BaseException) -> str:
    """What an error of another library says first, or its name where it says nothing."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0][:200])


def _short(line: str) -> str:
    where, colon, rest = line.partition(": ")
    if not colon or len(where) > _PATH or max(map(len, where.split("/"))) > _NAME:
        where, colon, rest = "", "", line
    if len(rest) > _LONGEST:
        rest = f"{rest[: _LONGEST - _ENDING - 3]} … {rest[-_ENDING:]}"
    return where + colon + rest


def nearest(word: str, known) -> str:
    """'; did you mean X?' when one of `known` is close to `word`, else an empty string."""
    import difflib

    close = difflib.get_close_matches(str(word)[:100], [str(name) for name in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
