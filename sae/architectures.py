"""The table of architectures: what a finished SAE is, its selection rule, input convention and objective. A new one
is one row here, one page in objectives/, one twin in tests/reference/.

An architecture is trained under its own name and finished under `inference`: BatchTopK and Matryoshka end as JumpReLU
with a calibrated threshold, as in SAELens. `SAEConfig.architecture` is always the finished name; the other one is
kept as `Metadata.training_architecture`.
"""

from dataclasses import dataclass

from sae.errors import UserError, nearest


@dataclass(frozen=True)
class Architecture:
    inference: str
    """What a finished SAE is: "topk", "jumprelu" (a threshold for each feature) or "relu"; or one of LOADED."""
    selection: str
    """How features are chosen at inference: "topk" (k a row), "threshold" (those above theirs; relu's is 0), or
    "dense": a rule of selections.py, for which all pre-activations are held."""
    subtracts_b_dec: bool
    """Whether training gives the encoder x − b_dec (SAELens: apply_b_dec_to_input). A loaded SAE says it itself."""
    objective: str
    """Page in objectives/ that trains it."""


ARCHITECTURES = {
    "topk": Architecture("topk", "topk", True, "topk"),
    "batchtopk": Architecture("jumprelu", "threshold", True, "batchtopk"),
    "matryoshka": Architecture("jumprelu", "threshold", True, "matryoshka"),
    "jumprelu": Architecture("jumprelu", "threshold", False, "jumprelu"),
    "relu": Architecture("relu", "threshold", False, "relu"),
}
LOADED = {name: Architecture(name, "dense", True, "") for name in ("abstopk", "groupmax", "matching_pursuit")}
"""What others train and we only load: no objective, no kernel."""


def architecture(name: str) -> Architecture:
    """The row of a name; an unknown one is a UserError that lists the table."""
    if not isinstance(name, str) or name not in ARCHITECTURES:  # files say it
        raise UserError(
            f"sae.architecture: {name!r} is not known (known: {', '.join(ARCHITECTURES)}){nearest(name, ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def finished(name: str) -> Architecture:
    """The row of what a finished SAE can be; a name that only training knows is a UserError."""
    row = LOADED.get(name) or architecture(name)
    if row.inference != name:
        raise UserError(f"SAE: {name} is how one is trained; finished, it is {row.inference}. Use that name.")
    return row
