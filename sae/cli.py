"""The command `sae`: a verb is parse, one call, one print.

`sae --help` prints the table below and imports nothing else; `sae VERB --help` adds argparse and the recipe's
dataclasses, never torch. Heavy imports happen inside verbs. Results go to stdout, everything else to stderr.
Exit codes: 0 done · 1 our fault (with a traceback) · 2 the user's input (one line) · 130 Ctrl-C.
"""

import sys
from collections.abc import Callable

from sae.errors import Stopped, UserError, nearest
from sae.verbs import ALIASES, VERBS

__all__ = ["ALIASES", "VERBS", "main"]


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader went away, as in `sae show … | head`
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_table_of_verbs())
        return 0
    if words[0] in ("-V", "--version"):
        from sae import __version__

        print(f"goldengate-sae {__version__}")
        return 0
    verb = ALIASES.get(words[0], words[0])
    if verb not in VERBS:
        close = nearest(verb, VERBS) or "."
        _complain(f"sae: {words[0]} is not a verb{close} `sae --help` lists them.")
        return 2
    _quiet()
    try:
        page(verb)(words[1:])
        return 0
    except UserError as error:
        _complain(f"sae {verb}: {str(error).removeprefix(f'{verb}: ')}")
        return 2
    except Stopped as stopped:
        _complain(f"sae {verb}: {stopped}")
        return stopped.code
    except KeyboardInterrupt:
        print(f"sae {verb}: interrupted", file=sys.stderr)
        return 130


def page(verb: str) -> Callable[[list[str]], None]:
    """The function of a verb."""
    from importlib import import_module

    return getattr(import_module(f"sae.verbs.{VERBS[verb][0]}"), verb)


def _complain(message: str) -> None:
    """One line on stderr, whatever a path or another library's message holds."""
    from sae import table

    print(table.clean(" ".join(line.strip() for line in message.splitlines() if line.strip())), file=sys.stderr)


def _table_of_verbs() -> str:
    from sae import __version__

    lines = [
        f"goldengate-sae {__version__}: harvest, learn, find and steer the features of a language model",
        "",
        "usage: sae VERB …        `sae VERB --help` says more",
        "",
        *(f"  {verb:<10}{about}" for verb, (_, about) in VERBS.items()),
        "",
        "first steps: sae demo    sae train configs/smollm2.yaml    sae info FOLDER",
    ]
    return "\n".join(lines)


def _quiet() -> None:
    """Our lines only: no advice of other libraries between them, and no crash on a terminal without UTF-8."""
    import os
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")


if __name__ == "__main__":
    raise SystemExit(main())
