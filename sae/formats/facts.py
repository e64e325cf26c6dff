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
