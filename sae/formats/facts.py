"""What every page of a layout gives and takes: Facts, and tensors in one orientation and dtype.

tensors, all float32 and finite (a threshold may be infinite: it never fires):
    W_enc [d_in, d_sae]    W_dec [d_sae, d_out]    b_enc [d_sae]    b_dec [d_out]
    threshold [d_sae]      of jumprelu
    W_skip [d_out, d_in]   of a skip transcoder: x̂ += x @ W_skip.T
Whatever a layout folds, logs or shares (norm factors, log thresholds, one threshold for all) its page undoes, so that
encode(x) = rule(normed(x)·W_enc + b_enc), with b_dec taken off first where `apply_b_dec_to_input` says so.
"""

from dataclasses import dataclass, field
from typing import Any

from sae.errors import UserError
from sae.selections import Pursuit


@dataclass(frozen=True)
class Facts:
    architecture: str
    """How features are chosen: topk, jumprelu, relu, abstopk, groupmax or matching_pursuit."""
    d_in: int
    d_sae: int
    k: int | None = None
    """Of topk and abstopk: features a row; of groupmax: groups."""
    apply_b_dec_to_input: bool = False
    d_out: int | None = None
    """Of a transcoder: the width that is written; None for an SAE."""
    normalize_activations: str = "none"
    """none, or how each token is normed (sae/token_norm.py)."""
    threshold: float | None = None
    """Of topk: one calibrated threshold that reads single features about as the rule would; None without one."""
    pursuit: Pursuit | None = None
    """Of matching_pursuit."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Fields of autoencoder.Metadata by their names; those that are not known are left out."""

    def said_by(self) -> list[str]:
        """The libraries whose own layouts can say this SAE, and whose packages then load it."""
        rule, normed = self.architecture, self.normalize_activations != "none"
        saelens = rule != "groupmax" and (self.d_out is None or rule in ("relu", "jumprelu"))
        sparsify = rule in ("topk", "groupmax") and self.d_out in (None, self.d_in) and not normed
        dictionary_learning = rule in ("relu", "topk", "jumprelu") and self.d_out is None and not normed
        found = {"saelens": saelens, "sparsify": sparsify, "dictionary_learning": dictionary_learning}
        return [name for name, can in found.items() if can]

    def refusal(self, library: str) -> UserError:
        """That a library's layout has no such SAE, and which has."""
        normed = "" if self.normalize_activations == "none" else f" with {self.normalize_activations} of each token"
        kind = "" if self.d_out is None else f" in a transcoder from width {self.d_in:,} to {self.d_out:,}"
        other = self.said_by()
        remedy = f"Write it as {other[0]}." if other else "No other library has one; SAE.save keeps it for this one."
        what = f"{self.architecture}{kind}{normed}"
        return UserError(f"{library}: this SAE is {what}, which its layout has no words for. {remedy}")
