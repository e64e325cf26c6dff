"""Max-pooling: how strongly each feature fires in each document, sparse.

A document's maximum of a feature is over its counted positions (a block's mask), in raw units. Nothing of shape
[documents, F] is ever made: cost and memory go with the entries that fired (some thousand a document).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae import kernels
from sae.codes import Codes, from_topk
from sae.errors import UserError
from sae.machine import machine_dtype

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from sae.activations.harvest import Block
    from sae.autoencoder import SAE
    from sae.host import Host

_CHUNK = 4096  # rows encoded at once
_SPARE = 8  # features selected in bfloat16 beyond k
_ROUNDING = 2**-7  # of a bfloat16 product, twice
LARGEST = torch.iinfo(torch.int32).max


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
        rows, entries = spans(self.offsets, documents)
        return rows, self.features[entries].long(), self.values[entries].float()


def spans(
    offsets: Int[Tensor, " n_plus_1"], which: Int[Tensor, " m"]
) -> tuple[Int[Tensor, " entries"], Int[Tensor, " entries"]]:
    """The entries of some rows of a CSR, in the order of `which`: (place in which, number of the entry) of each."""
    counts = offsets[which + 1] - offsets[which]
    rows = torch.arange(len(which)).repeat_interleave(counts)
    return rows, torch.arange(len(rows)) + (offsets[which] - counts.cumsum(0) + counts)[rows]


@dataclass(frozen=True)
class Entries:
    """Where features fire in a block: `row` counts from a given number on, `act` > 0 is in raw units."""

    feature: Int[Tensor, " n"]
    row: Int[Tensor, " n"]
    act: Float[Tensor, " n"]
    document: Int[Tensor, " n"]
    token: Int[Tensor, " n"]

    def __getitem__(self, which: Tensor) -> Entries:
        return Entries(self.feature[which], self.row[which], self.act[which], self.document[which], self.token[which])


Reader = Callable[[Tensor], Codes]


def reader(sae: SAE) -> Reader:
    """How activations [n, d] become codes on the CPU, with float32 values.

    On a CPU that multiplies bfloat16 the product that selects is in bfloat16, with a margin; the values of what it
    selects are then computed in float32, and the rule is applied to these. So values are exact, and what is selected
    differs from float32 only where more than 8 features lie closer together than bfloat16 tells apart.
    """
    own_rule = sae.architecture.selection == "dense"
    if own_rule or sae.device.type != "cpu" or sae.dtype != torch.float32 or machine_dtype("cpu") != torch.bfloat16:
        return lambda x: _on_cpu(sae.encode_sparse(x.to(sae.device)))
    encoder, low, b_enc = sae.encoder.detach(), sae.encoder.detach().bfloat16(), sae.b_enc.detach().float()
    if sae.architecture.selection == "topk":
        k, F = min(sae.cfg.k or 1, sae.cfg.d_sae), sae.cfg.d_sae

        def of_topk(x: Tensor) -> Codes:
            x = sae.centred(x).detach()
            found = kernels.encode_select(x, low, b_enc, kernels.TopK(min(k + _SPARE, F)))
            exact = (_products(x, encoder, found) + b_enc[found.indices]).view(len(x), -1)
            kept = exact.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
            return from_topk(exact.gather(1, kept).relu(), found.indices.view(len(x), -1).gather(1, kept), F)

        return of_topk
    floor = torch.zeros(sae.cfg.d_sae) if sae.threshold is None else sae.threshold.clamp_min(0)
    lengths = encoder.norm(dim=1)

    def above(x: Tensor) -> Codes:
        x = sae.centred(x).detach()
        longest = float(x.norm(dim=1).max()) if len(x) else 0.0
        margin = _ROUNDING * ((floor - b_enc).abs() + lengths * longest * (4 / x.shape[1] ** 0.5))
        found = kernels.encode_select(x, low, b_enc, kernels.Above(floor - margin))
        exact = _products(x, encoder, found) + b_enc[found.indices]
        kept = exact > floor[found.indices]
        counts = torch.bincount(found.rows()[kept], minlength=len(x))
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return Codes(exact[kept], found.indices[kept], offsets, found.n_features)

    return above


def _products(x: Tensor, encoder: Tensor, codes: Codes) -> Tensor:
    """x[row] · encoder[feature] of every entry, without an [nnz, d]."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x, encoder, codes.indices, codes.offsets[:-1], codes.rows(), 0
    )


def _on_cpu(codes: Codes) -> Codes:
    return Codes(codes.values.float().cpu(), codes.indices.cpu(), codes.offsets.cpu(), codes.n_features)


def counted(block: Block, hook: str) -> Bool[Tensor, " N"]:
    """Positions in the mask and in a document whose activations are finite, on the CPU."""
    return (block.mask & (block.doc >= 0)).cpu() & block.acts[hook].isfinite().all(dim=1).cpu()


def entries(read: Reader, block: Block, hook: str, own: Bool[Tensor, " N"], first_row: int = 0) -> Entries:
    """What fires at the positions `own` (`counted`) of a block, in order; its first row has the number `first_row`.
    Activations below 0 (AbsTopK has them) are left out."""
    rows = own.nonzero().flatten()
    acts, doc, tokens = block.acts[hook], block.doc.cpu().long(), block.tokens.cpu().long()
    found = []
    for part in rows.split(_CHUNK) if len(rows) else ():
        codes = read(acts[part.to(acts.device)])
        fired = (codes.values > 0).nonzero().flatten()
        at = part[codes.rows()[fired]]
        found.append(Entries(codes.indices[fired], at + first_row, codes.values[fired], doc[at], tokens[at]))
    if not found:
        none = torch.zeros(0, dtype=torch.int64)
        return Entries(none, none, torch.zeros(0), none, none)
    return Entries(*(torch.cat([getattr(one, field.name) for one in found]) for field in fields(Entries)))


def strongest(entries: Entries, n_features: int) -> Int[Tensor, " m"]:
    """Of each (document, feature) the entry of largest act, the earlier among equals; by document, then feature."""
    if not len(entries.row):
        return entries.row
    document = entries.document.unique(return_inverse=True)[1]
    key = document * n_features + entries.feature
    order = by(key, entries.act.view(torch.int32))
    return order[first_of(key[order])]


def by(group: Int[Tensor, " n"], score: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The order by group (below 2^32), in it by score (0 to 2^31-1), largest first; stable. The bits of a positive
    float32 order as it does."""
    return (group.long() << 31 | (LARGEST - score.long())).argsort(stable=True)


def first_of(*keys: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Where a run of equal keys begins."""
    new = torch.zeros(len(keys[0]), dtype=torch.bool)
    new[:1] = True
    for key in keys:
        new[1:] |= key[1:] != key[:-1]
    return new


def in_csr(
    document: Int[Tensor, " n"], feature: Int[Tensor, " n"], act: Float[Tensor, " n"], seen: Bool[Tensor, " D"], F: int
) -> DocumentMaxima:
    """The maxima of entries in any order, several a (document, feature) or one."""
    key = document * F + feature
    order = act.argsort(descending=True, stable=True)
    order = order[key[order].argsort(stable=True)]
    order = order[first_of(key[order])]
    offsets = torch.searchsorted(document[order], torch.arange(len(seen) + 1))
    return DocumentMaxima(offsets, feature[order].int(), act[order], seen, F)


def document_maxima(sae: SAE, blocks: Iterable[Block], n_documents: int, *, hook: str) -> DocumentMaxima:
    """Max-pooled activations of documents; a document may span blocks."""
    seen = torch.zeros(n_documents, dtype=torch.bool)
    read, best = reader(sae), []
    for block in blocks:
        own = counted(block, hook)
        found = entries(read, block, hook, own)
        one = found[strongest(found, sae.cfg.d_sae)]
        best.append((one.document, one.feature, one.act))
        seen[block.doc.cpu().long()[own]] = True
    none = torch.zeros(0, dtype=torch.int64)
    columns = [torch.cat(column) for column in zip(*best, strict=True)] or [none, none, torch.zeros(0)]
    return in_csr(columns[0], columns[1], columns[2], seen, sae.cfg.d_sae)


def text_blocks(texts: Sequence[str], sae: SAE, host: Host, hook: str | None = None) -> Iterator[Block]:
    """Texts run through the host as the SAE's own text was; a block's `doc` is the number of the text.

    hook    the SAE's own where None is given; texts longer than the SAE's context are read in pieces
    raises  UserError where there is no text at all, before anything is read
    """
    from sae.activations.harvest import stream
    from sae.text import pack

    if not texts:
        raise UserError("texts: none given. Give at least one.")
    metadata = sae.cfg.metadata
    hook = host.hook(hook or metadata.hook_name)
    rows = pack(texts, host.tokenizer, metadata.context_size or 128, special_ids=host.special_ids)
    limits = None if metadata.outlier_norm is None else {hook: metadata.outlier_norm}
    return stream(host, rows, [hook], outlier_norm=limits)


def text_maxima(texts: Sequence[str], sae: SAE, host: Host, hook: str | None = None) -> DocumentMaxima:
    """Texts run through host and SAE (`text_blocks`), and pooled: document j is texts[j]."""
    hook = host.hook(hook or sae.cfg.metadata.hook_name)
    return document_maxima(sae, text_blocks(texts, sae, host, hook), len(texts), hook=hook)
