"""What several verbs share: their flags, and texts from files."""

from sae.flags import Flags
from sae.verbs import VERBS

TEXTS = ".txt (split at empty lines), .jsonl or .parquet"


def flags_of(verb: str, example: str) -> Flags:
    """The flags of a verb, with what it does from the table."""
    return Flags(verb, VERBS[verb][1], example)


def add_host(flags: Flags) -> None:
    """--host MODEL, for verbs that load the host of an SAE."""
    flags.add_argument(
        "--host", metavar="MODEL",
        help="where the SAE names no model, or not its own: a name, a folder, a LoRA adapter's folder",
    )  # fmt: skip


def texts(path: str | None) -> list[str] | None:
    """The texts of a file, as everywhere: paragraphs of .txt, lines of .jsonl, rows of .parquet."""
    if path is None:
        return None
    from sae.text import documents

    return [document.text for document in documents(path)]
