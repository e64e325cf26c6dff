"""Which positions attend to which, and how a model is told: position ids and attention masks.

Promise: attention stays causal and inside equal document ids; where plain causal attention does that by
itself (one document a row, positions counted from 0) the answer is None, so that the model takes its fast
path. Cost otherwise: a mask [B, 1, T, T] of bool for SDPA, of the host's dtype for other attention codes.
Limits: of the other patterns only a sliding window is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Int


def positions_and_mask(
    config: Any,
    dtype: torch.dtype,
    shape: tuple[int, int],
    pos: Int[Tensor, "B T"] | None,
    doc: Int[Tensor, "B T"] | None,
    *,
    uniform: bool = False,
) -> tuple[Int[Tensor, "B T"] | None, Any]:
    """`position_ids` and `attention_mask` for a model's forward without a cache, each None where it can be.

    pos      position ids; None counts from 0 in each row, or in each document where doc is given
    doc      document of each position, -1 at padding: attention stays inside equal ids; None is causal
    uniform  neither is None where doc is given, whatever the rows hold: compiled layers are compiled for one form
    returns  the mask as a bool or float tensor, or one for each kind of layer where some have a window
    """
    if doc is not None and pos is None:
        pos = _positions(doc)
    uniform = uniform and doc is not None
    if pos is not None and not uniform and _counts_from_zero(pos, doc):
        pos = None
    plain = doc is None or (not uniform and _one_document_a_row(doc))
    if plain and pos is None:  # position ids that restart would make transformers isolate by itself
        return None, None
    B, T = shape
    given = pos if pos is not None else doc
    assert given is not None
    steps = torch.arange(T, device=given.device)
    allowed = (steps[:, None] >= steps[None, :])[None]
    if not plain:
        assert doc is not None
        allowed = allowed & (doc[:, :, None] == doc[:, None, :])
    allowed = allowed.expand(B, T, T)[:, None]
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if window is not None and window < T:
        near = allowed & (steps[:, None] - steps[None, :] < window)
        if kinds > {"sliding_attention"}:
            return pos, {
                "full_attention": _form(config, dtype, allowed),
                "sliding_attention": _form(config, dtype, near),
            }
        if kinds != {"full_attention"}:
            allowed = near
    return pos, _form(config, dtype, allowed)


def _form(config: Any, dtype: torch.dtype, allowed: Bool[Tensor, "B 1 T T"]) -> Tensor:
    """In the form that the model's attention code takes."""
    if config._attn_implementation == "sdpa":
        return allowed
    return torch.where(allowed, torch.zeros((), dtype=dtype, device=allowed.device), torch.finfo(dtype).min)


def _one_document_a_row(doc: Int[Tensor, "B T"]) -> bool:
    """Whether causal attention alone isolates documents: one a row, from position 0, padding behind it."""
    same = (doc == doc[:, :1]) & (doc[:, :1] >= 0)
    return bool(((doc < 0) | same).all() and (same[:, 1:] <= same[:, :-1]).all() and (doc[:, 0] >= 0).all())


def _counts_from_zero(pos: Int[Tensor, "B T"], doc: Tensor | None) -> bool:
    """Whether the position ids are those that a model counts by itself, padding aside."""
    same = pos == torch.arange(pos.shape[1], device=pos.device)
    return bool((same if doc is None else same | (doc < 0)).all())


def _positions(doc: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Positions that restart at 0 where the document changes."""
    steps = torch.arange(doc.shape[1], device=doc.device).expand_as(doc)
    new = torch.ones_like(doc, dtype=torch.bool)
    new[:, 1:] = doc[:, 1:] != doc[:, :-1]
    return steps - torch.where(new, steps, 0).cummax(dim=1).values
