"""What a user, a file or a network can cause is a UserError: one line that says where, what is (with the
value), what was expected and what to do. The command line prints it and exits with 2; internal
impossibilities stay `assert` with a message."""


class UserError(Exception):
    """One line for the user; its last words are something to do."""


class Stopped(Exception):
    """A long job ends before its end and has saved its state; the text says how to go on.

    code   the command's exit: 130 where the user asked for it, 0 where this process has done all of its own share
    """

    def __init__(self, message: str, code: int = 130):
        super().__init__(message)
        self.code = code


def nearest(word: str, known) -> str:
    """'; did you mean X?' when one of `known` is close to `word`, else an empty string."""
    import difflib

    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
