"""The top examples of the index, on the real host and the shipped SAE, against brute force over dense activations."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from sae.activations.harvest import Block, outlier_limits, stream
from sae.autoencoder import SAE
from sae.documents import documents
from sae.features import build
from sae.text import pack

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "smollm2-golden-gate"
TOP = 20
# Where the last selected and the first unselected activation of a token are as near as two roundings, either may be
# chosen: such tokens are masked for both sides.
NEAR = 1e-5


def brute_force(sae, x):
    """TopK straight from its formula in float64, and where the choice is no matter of rounding."""
    W_enc, b_enc, b_dec = (getattr(sae, name).double() for name in ("W_enc", "b_enc", "b_dec"))
    pre = (x.double() - b_dec) @ W_enc + b_enc
    values, indices = pre.topk(sae.cfg.k + 1)
    acts = torch.zeros_like(pre).scatter(1, indices[:, :-1], values[:, :-1].clamp(min=0))
    return acts, values[:, -2] - values[:, -1] > NEAR * values[:, -2].abs()


@pytest.fixture(scope="module")
def made(host, tmp_path_factory):
    """The index of 48 short documents, their dense activations [N, F], and document and mask of each row."""
    sae, found = SAE.load(CHECKPOINT), []
    hook = host.hook(sae.cfg.metadata.hook_name)
    texts = [document.text[:160] for document in islice(documents("bundled"), 48)]  # more than a list holds
    rows = list(pack(texts, host.tokenizer, 64, special_ids=host.special_ids, note=found.append))
    limits = outlier_limits(host, rows[0], [hook])
    acts, doc, mask, blocks = [], [], [], []
    for block in stream(host, rows, [hook], outlier_norm=limits):
        dense, clear = brute_force(sae, block.acts[hook])
        counted = block.mask & clear & (block.doc >= 0)
        blocks.append(Block(block.acts, block.tokens, block.doc, block.pos, counted))
        acts.append(dense)
        doc.append(block.doc)
        mask.append(counted)
    strings = host.text_of(range(len(host.tokenizer)))
    index = build(sae, blocks, found, strings, tmp_path_factory.mktemp("top") / "index", hook=hook, top=TOP)
    return index, torch.cat(acts), torch.cat(doc).long(), torch.cat(mask)


def by_document(values, doc, n):
    """The maximum of each document [n, F]."""
    index = doc.clamp(min=0)[:, None].expand_as(values)
    return torch.zeros(n, values.shape[1], dtype=values.dtype).scatter_reduce_(0, index, values, "amax")


def test_top_examples_of_every_feature_are_the_strongest_documents_by_brute_force(made):
    """As many as there are, in order, each with the activation of the document's strongest counted token."""
    index, dense, doc, mask = made
    dense = dense * mask[:, None]
    best = by_document(dense, doc, index.facts.n_documents)
    strongest = best.topk(min(TOP, len(best)), dim=0).values
    firing = 0
    for feature in range(index.facts.n_features):
        examples = index.examples(feature, TOP)
        expected = strongest[:, feature]
        expected = expected[expected > 0]
        assert len(examples) == len(expected)
        acts = torch.tensor([example.act for example in examples], dtype=torch.float64)
        torch.testing.assert_close(acts, expected, rtol=1e-4, atol=1e-4)
        where = torch.tensor([example.position for example in examples], dtype=torch.int64)
        torch.testing.assert_close(dense[where, feature], acts, rtol=1e-4, atol=1e-4)
        assert (acts.diff() <= 0).all()
        firing += bool(len(examples))
    assert firing > 1000, "a text on which few features fire tests little"
    assert ((best > 0).sum(0) > TOP).any(), "no list was cut"


def test_top_examples_hold_no_document_twice_and_no_masked_position(made):
    index, dense, doc, mask = made
    for feature in range(index.facts.n_features):
        examples = index.examples(feature, TOP)
        documents_of = [example.document for example in examples]
        assert len(set(documents_of)) == len(documents_of)
        assert all(doc[e.position] == e.document and mask[e.position] for e in examples)


def test_top_examples_are_the_same_places_as_by_brute_force_but_for_near_ties(made):
    """Places that differ are as strong as each other to rounding; with a gap there is no choice."""
    index, dense, doc, mask = made
    dense = dense * mask[:, None]
    best = by_document(dense, doc, index.facts.n_documents)
    differing = total = 0
    for feature in range(index.facts.n_features):
        examples = index.examples(feature, TOP)
        order = best[:, feature].argsort(descending=True, stable=True)[: len(examples)]
        for example, document in zip(examples, order.tolist(), strict=True):
            at = ((doc == document) & (dense[:, feature] == best[document, feature])).nonzero()[0].item()
            if at != example.position:
                a, b = dense[at, feature], dense[example.position, feature]
                assert abs(a - b) <= NEAR * max(a, b)
                differing += 1
            total += 1
    assert differing <= total / 1000
