"""Harvest: rows to blocks, in order, isolated, masked."""

import pytest
import torch

from sae.activations import harvest
from sae.errors import UserError
from sae.masks import positions_and_mask
from sae.text import Document, Rows, pack, segments

HOOKS = ["blocks.1.hook_resid_post", "blocks.2.attn.hook_z"]


@pytest.fixture(scope="module")
def batches(tiny_host):
    texts = [f"Document number {i} speaks of bridges, " * (1 + i % 4) for i in range(40)]
    documents = [Document(text, group=str(i)) for i, text in enumerate(texts)]
    packed = pack(documents, tiny_host.tokenizer, 37, isolate=True, special_ids=tiny_host.special_ids, rows_per_batch=9)
    return list(packed)


def test_a_block_holds_the_flat_rows_of_every_hook(tiny_host, batches):
    blocks = list(harvest.stream(tiny_host, batches, HOOKS))
    assert len(blocks) == len(batches)
    for block, rows in zip(blocks, batches, strict=True):
        assert len(block) == rows.tokens.numel()
        assert torch.equal(block.tokens, rows.tokens.reshape(-1)) and block.tokens.dtype == torch.int32
        assert torch.equal(block.mask, rows.mask.reshape(-1))
        assert block.acts[HOOKS[0]].shape == (len(block), 32) and block.acts[HOOKS[1]].shape == (
            len(block),
            32,
        )
        assert block.acts[HOOKS[0]].dtype == tiny_host.dtype


def test_the_size_of_a_forward_changes_nothing(tiny_host, batches, monkeypatch):
    whole = next(iter(harvest.stream(tiny_host, batches, HOOKS)))
    monkeypatch.setitem(harvest._TOKENS_A_FORWARD, "cpu", 40)
    single = next(iter(harvest.stream(tiny_host, batches, HOOKS)))
    text = whole.doc >= 0  # what stands at padding is nobody's
    for name in HOOKS:
        torch.testing.assert_close(single.acts[name][text], whole.acts[name][text], atol=1e-5, rtol=1e-4)


def test_a_document_in_a_row_reads_like_the_document_alone(tiny_host, batches):
    rows = batches[0]
    block = next(iter(harvest.stream(tiny_host, [rows], HOOKS)))
    doc = rows.doc.reshape(-1)
    assert len(set(rows.doc[0].tolist())) > 1, "the first row should hold several documents"
    last = int(rows.doc[0].max())
    here = (doc == last) & (torch.arange(len(doc)) < rows.tokens.shape[1])
    alone = tiny_host.activations(rows.tokens.reshape(-1)[here][None], HOOKS)
    for name in HOOKS:
        torch.testing.assert_close(block.acts[name][here], alone[name][0], atol=1e-4, rtol=1e-4)


def test_rows_packed_without_isolation_read_like_a_plain_causal_forward(tiny_host):
    texts = [f"Document number {i} speaks of bridges, " * (1 + i % 3) for i in range(12)]
    (rows,) = pack(texts, tiny_host.tokenizer, 37, isolate=False)
    text = (rows.doc >= 0).reshape(-1)
    assert rows.doc[0].unique().numel() > 1 and not bool(text.all()), "several documents a row, and padding"
    block = next(iter(harvest.stream(tiny_host, [rows], HOOKS)))
    plain = tiny_host.activations(rows.tokens, HOOKS)
    isolated = tiny_host.activations(rows.tokens, HOOKS, pos=rows.pos, doc=rows.doc)
    for name in HOOKS:
        torch.testing.assert_close(block.acts[name][text], plain[name].flatten(0, 1)[text], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(block.acts[name][text], isolated[name].flatten(0, 1)[text], atol=1e-3)
    assert positions_and_mask(tiny_host.model.config, torch.float32, rows.tokens.shape, rows.pos, segments(rows)) == (
        None,
        None,
    ), "the fast path: no mask, no position ids"


def test_outliers_leave_the_mask_and_nothing_else_does(tiny_host, batches):
    limits = harvest.outlier_limits(tiny_host, batches[0], HOOKS)
    assert set(limits) == set(HOOKS)
    plain = next(iter(harvest.stream(tiny_host, batches, HOOKS)))
    norms = plain.acts[HOOKS[0]].norm(dim=1)
    assert limits[HOOKS[0]] == pytest.approx(10 * float(norms[plain.mask].median()), rel=1e-5)
    low = float(norms[plain.mask].quantile(0.9))
    cut = next(iter(harvest.stream(tiny_host, batches, HOOKS, outlier_norm={HOOKS[0]: low})))
    assert torch.equal(cut.mask, plain.mask & (norms <= low))
    assert 0 < int((plain.mask & ~cut.mask).sum()) < int(plain.mask.sum())


def test_an_unknown_hook_is_refused_before_anything_is_read(tiny_host):
    def rows():
        pytest.fail("text was read")
        yield

    with pytest.raises(UserError, match="names no site"):
        harvest.stream(tiny_host, rows(), ["blocks.1.hook_rsd"])
    with pytest.raises(UserError, match="no hooks"):
        harvest.stream(tiny_host, rows(), [])


def test_rows_without_a_valid_position_are_refused_for_limits(tiny_host, batches):
    rows = batches[0]
    empty = Rows(rows.tokens, rows.doc, rows.pos, torch.zeros_like(rows.mask))
    with pytest.raises(UserError, match="only padding"):
        harvest.outlier_limits(tiny_host, empty, HOOKS)
