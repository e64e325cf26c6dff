"""Pairs of snippets, flawed and fixed, that differ in the flaw's lines alone; and a harmless edit of the same size.

`python.txt`, `c.txt`, `javascript.txt` and `prose.txt` (typing errors, no code) hold them as a diff would. A pair
begins with "### kind: name"; the first character of a line says where it stands:

    space  everywhere        -  in the flawed one     +  in the fixed one
    <  in both of the pair   >  in the control, which is the fixed one with this in place of the lines with <

All are ours, written for this; none was taken from a program.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sae.errors import UserError

HERE = Path(__file__).parent
FLAWED, FIXED, CONTROL = " <-", " <+", " >+"  # the marks whose lines each version has


@dataclass(frozen=True)
class Snippet:
    """A pair and its control ('' where it has none); `lines` are the flawed lines of `flawed`, from 0."""

    kind: str
    name: str
    flawed: str
    fixed: str
    control: str
    lines: tuple[int, ...]

    @property
    def title(self) -> str:
        return f"{self.kind}: {self.name}"


def snippets(language: str) -> list[Snippet]:
    """All pairs of "python", "c", "javascript" or "prose", in their order."""
    path = HERE / f"{language}.txt"
    return parse(path.read_text(encoding="utf-8"), str(path))


def parse(text: str, where: str) -> list[Snippet]:
    """The pairs in a text; UserError names the line that is none of theirs."""
    found: list[tuple[str, list[str]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("### ") and ": " in line:
            found.append((line[4:], []))
        elif found and (not line or line[0] in " -+<>"):
            found[-1][1].append(line or " ")
        else:
            raise UserError(f"{where}, line {number}: begins with none of ' -+<>'. Mend that line.")
    return [_snippet(title, lines) for title, lines in found]


def _snippet(title: str, lines: list[str]) -> Snippet:
    def version(marks: str) -> str:
        return "".join(line[1:] + "\n" for line in lines if line[0] in marks)

    kind, _, name = title.partition(": ")
    own = [line for line in lines if line[0] in FLAWED]
    control = version(CONTROL) if any(line[0] == ">" for line in lines) else ""
    flawed = tuple(i for i, line in enumerate(own) if line[0] == "-")
    return Snippet(kind, name, version(FLAWED), version(FIXED), control, flawed)
