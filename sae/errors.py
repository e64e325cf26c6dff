"""What a user, a file or a network can cause is a UserError: one line that says where, what is (with the
value), what was expected and what to do. The command line prints it and exits with 2; internal
impossibilities stay `assert` with a message."""


class UserError(Exception):
    """One line for the user; its last words are something to do."""


class Stopped(Exception):
    """The user asked a long job to stop; it saved its state. The text says how to go on (exit 130)."""


def nearest(word: str, known) -> str:
    """'; did you mean X?' when one of `known` is close to `word`, else an empty string."""
    import difflib

    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
