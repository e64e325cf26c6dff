"""From token rows to activations: the host runs up to the last hook, rows come out flat and in order.

A `Block` holds, for each hook, the activations [N, width] of one batch of rows on the CPU in the host's own
units and dtype, with token, document, position and mask of each row. `mask` is the text's (padding, special
tokens, position 0) and, where limits are given, leaves out rows whose norm is above the limit at any of the
hooks: attention sinks and other outliers (10 times the median norm). Cost: one forward to the last hook;
memory: one block. Attention stays inside a piece of text, or runs through the row where documents were packed
without isolation. Rows go through the host in small groups, which changes nothing but the speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.errors import UserError
from sae.host import Host
from sae.text import Rows, segments

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

# Tokens in one forward. On a CPU, 1,024 keep the intermediate values in the cache and below malloc's mmap
# threshold: 8% more tokens/s than 8,192 (SmolLM2 to layer 15, one thread, bfloat16 and float32 alike).
_TOKENS_A_FORWARD = {"cpu": 1024}
_TOKENS_A_FORWARD_ELSEWHERE = 16384
OUTLIER_FACTOR = 10.0


@dataclass(frozen=True)
class Block:
    """N = rows x context activations of each hook, flattened in order."""

    acts: dict[str, Float[Tensor, "N width"]]
    tokens: Int[Tensor, " N"]
    doc: Int[Tensor, " N"]
    pos: Int[Tensor, " N"]
    mask: Bool[Tensor, " N"]

    def __len__(self) -> int:
        return self.tokens.shape[0]


def stream(
    host: Host, rows: Iterable[Rows], hooks: Sequence[str], *, outlier_norm: Mapping[str, float] | None = None
) -> Iterator[Block]:
    """One Block for each batch of rows; hooks are named as the host names them, keys are its canonical names.

    outlier_norm   the largest norm of a valid activation, by hook (see `outlier_limits`); a hook without one,
                   and None, leaves no row out
    raises         UserError for an unknown hook, before anything is read
    """
    names = [host.hook(name) for name in hooks]
    if not names:
        raise UserError("harvest: no hooks were asked for. Name one, such as blocks.15.hook_resid_post.")
    limits = {host.hook(name): limit for name, limit in (outlier_norm or {}).items()}
    return (_block(host, batch, names, limits) for batch in rows)


def _block(host: Host, rows: Rows, names: list[str], limits: Mapping[str, float]) -> Block:
    R, T = rows.tokens.shape
    group = max(1, _TOKENS_A_FORWARD.get(host.device.type, _TOKENS_A_FORWARD_ELSEWHERE) // T)
    segment = segments(rows)
    # On CUDA into page-locked memory (torch keeps such blocks for the next call), copied while the next group runs.
    cuda = host.device.type == "cuda"
    acts = {name: torch.empty(R, T, host.width(name), dtype=host.dtype, pin_memory=cuda) for name in names}
    for start in range(0, R, group):
        part = slice(start, min(start + group, R))
        given = [x[part] for x in (rows.tokens, rows.pos, segment)]
        if host.is_compiled and part.stop - start < group:  # for one shape: the last row again and again
            given = [torch.cat([x, x[-1:].expand(group - len(x), T)]) for x in given]
        found = host.activations(given[0], names, pos=given[1], doc=given[2])
        for name, values in found.items():
            acts[name][part].copy_(values[: part.stop - start], non_blocking=cuda)
    if cuda:
        torch.cuda.current_stream(host.device).synchronize()
    return flattened(acts, rows, limits)


def flattened(acts: Mapping[str, Float[Tensor, "R T width"]], rows: Rows, limits: Mapping[str, float]) -> Block:
    """The block of token rows and their activations; limits as `outlier_norm` of `stream`."""
    R, T = rows.tokens.shape
    flat = {name: values.reshape(R * T, -1) for name, values in acts.items()}
    mask = rows.mask.reshape(-1).clone()
    for name, limit in limits.items():
        if name in flat:
            mask &= _norms(flat[name]) <= limit
    int32 = [values.reshape(-1).to(torch.int32) for values in (rows.tokens, rows.doc, rows.pos)]
    return Block(flat, int32[0], int32[1], int32[2], mask)


def _norms(acts: Float[Tensor, "N width"]) -> Float[Tensor, " N"]:
    return torch.linalg.vector_norm(acts, dim=1, dtype=torch.float32)


def outlier_limits(host: Host, rows: Rows, hooks: Sequence[str]) -> dict[str, float]:
    """`limits_of` a first sample of rows, run through the host."""
    (block,) = stream(host, [rows], hooks)
    return limits_of(block)


def limits_of(block: Block) -> dict[str, float]:
    """For each hook, 10 times the median norm over the valid positions of a block.

    Attention sinks have norms of some hundred medians in the residual stream, ordinary tokens below three.
    """
    if not bool(block.mask.any()):
        raise UserError("harvest: the first rows hold only padding and special tokens. Give more text.")
    return {name: OUTLIER_FACTOR * float(_norms(acts[block.mask]).median()) for name, acts in block.acts.items()}
