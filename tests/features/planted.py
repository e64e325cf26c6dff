"""Blocks, documents and SAEs whose feature activations are known beforehand."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae.autoencoder import SAE, SAEConfig
from sae.features.index import IndexedDocument
from sae.features.pool import DocumentMaxima

HOOK = "blocks.2.hook_resid_post"


@dataclass
class PlantedBlock:
    """The fields of activations.harvest.Block, so that these tests need no host."""

    acts: dict[str, Tensor]
    tokens: Tensor
    doc: Tensor
    pos: Tensor
    mask: Tensor


def identity_sae(F: int = 24, k: int = 4) -> SAE:
    """Feature i fires with the value of component i."""
    model = SAE(SAEConfig("topk", F, F, k))
    with torch.no_grad():
        model.encoder.copy_(torch.eye(F))
        model.W_dec.copy_(torch.eye(F))
    return model.requires_grad_(False)


def columns(n_documents: int, length: int, d: int, seed: int = 0) -> PlantedBlock:
    """Documents one after the other, each with a first position masked, and padding after every second."""
    generator = torch.Generator().manual_seed(seed)
    doc, pos = [], []
    for number in range(n_documents):
        doc += [number] * length + ([-1, -1] if number % 2 else [])
        pos += list(range(length)) + ([0, 0] if number % 2 else [])
    doc, pos = torch.tensor(doc, dtype=torch.int32), torch.tensor(pos, dtype=torch.int32)
    acts = torch.randn(len(doc), d, generator=generator)
    tokens = torch.randint(0, 50, (len(doc),), generator=generator, dtype=torch.int32)
    return PlantedBlock({HOOK: acts}, tokens, doc, pos, (doc >= 0) & (pos > 0))


def cut(block: PlantedBlock, sizes: Sequence[int]) -> Iterator[PlantedBlock]:
    """The same rows in several blocks; the last takes the rest."""
    start = 0
    for end in [*torch.tensor(sizes).cumsum(0).tolist(), len(block.mask)]:
        rows = slice(start, end)
        yield PlantedBlock(
            {HOOK: block.acts[HOOK][rows]},
            block.tokens[rows],
            block.doc[rows],
            block.pos[rows],
            block.mask[rows],
        )
        start = end


def texts(n: int, topic: str = "") -> list[IndexedDocument]:
    return [IndexedDocument(f"text {i}", topic=topic, form="essay", group=f"g{i}") for i in range(n)]


VOCABULARY = [f" t{i}" for i in range(50)]


def maxima_of(dense: Tensor) -> DocumentMaxima:
    """Max-pooled activations [documents, F], written out, as the sparse thing that pages read."""
    rows, features = dense.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(rows, minlength=len(dense)).cumsum(0)])
    seen = torch.ones(len(dense), dtype=torch.bool)
    return DocumentMaxima(offsets, features.int(), dense[rows, features], seen, dense.shape[1])
