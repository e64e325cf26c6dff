"""The table of architectures: selection rule, input convention, objective. A new one is one row here, one page in
objectives/, one twin in tests/reference/."""

from dataclasses import dataclass

from sae.errors import UserError, nearest


@dataclass(frozen=True)
class Architecture:
    selection: str
    """How features are chosen at inference: "topk" (k a row), or "threshold" (those above theirs)."""
    subtracts_b_dec: bool
    """Whether the encoder sees x − b_dec (SAELens: apply_b_dec_to_input)."""
    objective: str | None
    """Page in objectives/ that trains it."""


ARCHITECTURES = {
    "topk": Architecture("topk", True, "topk"),
}


def architecture(name: str) -> Architecture:
    """The row of a name; an unknown one is a UserError that lists the table."""
    if name not in ARCHITECTURES:
        raise UserError(
            f"sae.architecture: {name!r} is not known (known: {', '.join(ARCHITECTURES)}){nearest(name, ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]
