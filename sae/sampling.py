"""Top-p sampling without sorting the vocabulary: the next token of each row, drawn from the likeliest few.

Promise: the law of transformers' temperature, top-k and top-p, applied in this order (of tokens that tie with the k-th,
transformers keeps all, this the first). The tokens that make up the mass
`top_p` are found among the `_FEW` likeliest; where these do not hold it, among all. Drawing is part of it, so that
nothing of the vocabulary's length is sorted or filled with random numbers. On two cores the bundled host
(49,152 tokens) writes 96 rows twice as fast as with transformers' own sampling (353 against 178 tokens/s, one run).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_FEW = 256


@dataclass(frozen=True)
class Nucleus:
    """A logits processor that draws the token itself: its answer is 0 at the token drawn and −inf elsewhere, for a
    greedy `generate`. Randomness is torch's own generator."""

    temperature: float
    top_p: float
    top_k: int = 0

    def __call__(self, tokens: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        chosen = draw(scores, self.temperature, self.top_p, self.top_k)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def draw(scores: Float[Tensor, "B V"], temperature: float, top_p: float, top_k: int = 0) -> Int[Tensor, " B"]:
    """One token a row from the smallest set of likeliest tokens whose mass reaches `top_p`."""
    probs, tokens = nucleus(scores, temperature, top_p, top_k)
    return tokens.gather(1, torch.multinomial(probs, 1))[:, 0]


def nucleus(
    scores: Float[Tensor, "B V"], temperature: float, top_p: float, top_k: int = 0
) -> tuple[Float[Tensor, "B n"], Int[Tensor, "B n"]]:
    """(probabilities, tokens), likeliest first; 0 outside the nucleus, not normalised."""
    scores = (scores.float() - scores.amax(dim=1, keepdim=True).float()) / temperature
    V = scores.shape[1]
    few = min(top_k or _FEW, V)
    values, tokens = scores.topk(few, dim=1)
    total = (values if top_k else scores).logsumexp(dim=1, keepdim=True)
    probs = (values - total).exp()
    before = probs.cumsum(dim=1) - probs
    if not top_k and few < V and bool((before[:, -1] + probs[:, -1] < top_p).any()):
        values, tokens = scores.sort(dim=1, descending=True)
        probs = (values - total).exp()
        before = probs.cumsum(dim=1) - probs
    return probs.where(before < top_p, 0.0), tokens
