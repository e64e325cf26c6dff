"""Which features fire, and how strongly: the encoder's product and the selection of the k largest, in one go.

The [B, F] matrix of pre-activations is never held: rows go in chunks, only the codes are kept. On CPU a chunk's
product stays in the cache, and the selection reads group maxima first: the k largest entries lie in the k groups
with the largest maxima, so only those groups are searched (exact with respect to the product's own numbers).
Entries whose pre-activation is not positive are kept with value 0, so that every row has k entries.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.codes import Codes, from_topk

# Rows in a chunk: at F = 16,384 a bf16 chunk of 8 MB stays in a 32 MB cache.
CHUNK = 256


def encode_select(
    x: Float[Tensor, "B d"],
    encoder: Float[Tensor, "F d"],
    b_enc: Float[Tensor, " F"],
    k: int,
    *,
    implementation: str | None = None,
) -> Codes:
    """TopK codes: relu of the k largest entries of x·encoderᵀ + b_enc in each row.

    x         already centred (b_dec subtracted where the architecture does); cast to the encoder's dtype
    encoder   rows are features, contiguous; bfloat16 gives a bfloat16 product with float32 accumulation
    returns   codes with float32 values; ties go to the lower-cost order of torch.topk, the same from run to run
    memory    [CHUNK, F] once, never [B, F]
    """
    if implementation == "plain" or x.device.type != "cpu":
        return _plain(x, encoder, b_enc, k)
    return _cpu(x, encoder, b_enc, k)


def _plain(x: Tensor, encoder: Tensor, b_enc: Tensor, k: int) -> Codes:
    pre = x.to(encoder.dtype) @ encoder.T + b_enc.to(encoder.dtype)
    values, indices = pre.topk(k, dim=1)
    return from_topk(values.float().relu(), indices, encoder.shape[0])


def _cpu(x: Tensor, encoder: Tensor, b_enc: Tensor, k: int) -> Codes:
    B, F = x.shape[0], encoder.shape[0]
    x, bias = x.to(encoder.dtype), b_enc.to(encoder.dtype)
    values = torch.empty(B, k, dtype=torch.float32)
    indices = torch.empty(B, k, dtype=torch.int64)
    pre = torch.empty(min(B, CHUNK), F, dtype=encoder.dtype)
    for start in range(0, B, CHUNK):
        rows = slice(start, min(start + CHUNK, B))
        chunk = torch.addmm(bias, x[rows], encoder.T, out=pre[: rows.stop - start])
        top, at = top_in_groups(chunk, k)
        values[rows] = top
        indices[rows] = at
    return from_topk(values.relu_(), indices, F)


def top_in_groups(pre: Float[Tensor, "n F"], k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row with their indices, unordered; exactly torch.topk's values.

    A group is every G-th column, so that the maxima are one vectorised pass over contiguous memory.
    """
    n, F = pre.shape
    size = group_size(F, k)
    if size < 4:
        return pre.topk(k, dim=1, sorted=False)
    G = F // size
    groups = pre.view(n, size, G)
    best = groups.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates = groups.gather(2, best.unsqueeze(1).expand(n, size, k)).view(n, size * k)
    top, at = candidates.topk(k, dim=1, sorted=False)
    member, group = at // k, best.gather(1, at % k)
    return top, member * G + group


def group_size(F: int, k: int) -> int:
    """Columns in a group: a power of two near sqrt(F/k), which balances maxima and candidates; 1 = search all."""
    size = 1
    while F % (2 * size) == 0 and (2 * size) ** 2 <= 2 * F // max(k, 1) and F // (2 * size) >= 2 * k:
        size *= 2
    return size
