"""Max-pooling: how strongly each feature fires in each document, sparse.

A document's maximum of a feature is over its counted positions (a block's mask), in raw units. Nothing of shape
[documents, F] is ever made: cost and memory go with the entries that fired (some thousand a document).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from sae.activations.harvest import Block
    from sae.autoencoder import SAE
    from sae.codes import Codes
    from sae.host import Host

_CHUNK = 4096  # rows encoded at once


@dataclass(frozen=True)
class DocumentMaxima:
    """Max-pooled activations of documents in CSR: document j has `features[offsets[j]:offsets[j+1]]`, ascending.

    `seen` is False for documents of which no token was counted: nothing is known about those.
    """

    offsets: Int[Tensor, " D_plus_1"]
    features: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    seen: Bool[Tensor, " D"]
    n_features: int

    def __len__(self) -> int:
        return len(self.seen)

    def select(self, documents: Int[Tensor, " n"]) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"], Float[Tensor, " m"]]:
        """(row among the selected, feature, maximum) of every entry of some documents."""
        starts, counts = self.offsets[documents], self.offsets[documents + 1] - self.offsets[documents]
        rows = torch.repeat_interleave(torch.arange(len(documents)), counts)
        before = counts.cumsum(0) - counts
        entries = torch.arange(len(rows)) - before[rows] + starts[rows]
        return rows, self.features[entries].long(), self.values[entries].float()


def largest(keys: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
    """The distinct keys, ascending, and the largest value of each."""
    order = values.argsort(descending=True)
    order = order[keys[order].argsort(stable=True)]
    keys = keys[order]
    first = torch.ones(len(keys), dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    return keys[first], values[order][first]


def encoded(sae: SAE, acts: Float[Tensor, "N d"], rows: Int[Tensor, " n"]) -> Iterable[tuple[Int[Tensor, " m"], Codes]]:
    """Codes of some rows of activations, a few thousand at a time: (which rows, their codes on the CPU)."""
    for part in rows.split(_CHUNK):
        codes = sae.encode_sparse(acts[part.to(acts.device)].to(sae.W_dec.device))
        yield part, type(codes)(codes.values.float().cpu(), codes.indices.cpu(), codes.offsets.cpu(), codes.n_features)


def block_maxima(sae: SAE, block: Block, hook: str) -> tuple[Tensor, Tensor, Tensor]:
    """(document·F + feature, maximum) of a block, ascending by key, and the documents of which a token was counted."""
    F = sae.cfg.d_sae
    rows = (block.mask & (block.doc >= 0)).nonzero().flatten().cpu()
    doc = block.doc.cpu().long()
    keys, values = [], []
    for part, codes in encoded(sae, block.acts[hook], rows):
        fired = codes.values > 0
        keys.append(doc[part][codes.rows()[fired]] * F + codes.indices[fired])
        values.append(codes.values[fired])
    if not keys:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0), doc[rows]
    return *largest(torch.cat(keys), torch.cat(values)), doc[rows].unique()


def document_maxima(sae: SAE, blocks: Iterable[Block], n_documents: int, *, hook: str) -> DocumentMaxima:
    """Max-pooled activations of documents; a document may span blocks."""
    F = sae.cfg.d_sae
    seen = torch.zeros(n_documents, dtype=torch.bool)
    keys, values = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0)]
    for block in blocks:
        of_block = block_maxima(sae, block, hook)
        keys.append(of_block[0])
        values.append(of_block[1])
        seen[of_block[2]] = True
    found, best = largest(torch.cat(keys), torch.cat(values))
    offsets = torch.searchsorted(found, torch.arange(n_documents + 1) * F)
    return DocumentMaxima(offsets, (found % F).int(), best, seen, F)


def text_blocks(texts: Sequence[str], sae: SAE, host: Host, hook: str | None = None) -> Iterator[Block]:
    """Texts run through the host as the SAE's own text was; a block's `doc` is the number of the text.

    hook    the SAE's own where None is given; texts longer than the SAE's context are read in pieces
    raises  UserError where there is no text at all, before anything is read
    """
    from sae.activations.harvest import stream
    from sae.text import Document, pack

    if not texts:
        raise UserError("texts: none given. Give at least one.")
    metadata = sae.cfg.metadata
    hook = host.hook(hook or metadata.hook_name)
    documents = [Document(text=text, group=hashlib.sha256(text.encode()).hexdigest()) for text in texts]
    rows = pack(documents, host.tokenizer, metadata.context_size or 128, special_ids=host.special_ids)
    limits = None if metadata.outlier_norm is None else {hook: metadata.outlier_norm}
    return stream(host, rows, [hook], outlier_norm=limits)


def text_maxima(texts: Sequence[str], sae: SAE, host: Host, hook: str | None = None) -> DocumentMaxima:
    """Texts run through host and SAE (`text_blocks`), and pooled: document j is texts[j]."""
    hook = host.hook(hook or sae.cfg.metadata.hook_name)
    return document_maxima(sae, text_blocks(texts, sae, host, hook), len(texts), hook=hook)
