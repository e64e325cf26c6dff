"""Live blocks on disk: batches are the same whoever was killed when, nothing is harvested twice, little stays."""

import itertools
import shutil

import pytest
import torch

from sae import files, text
from sae.activations.batches import buffer_rows
from sae.activations.harvest import Block
from sae.activations.spool import Spool
from sae.activations.windows import windows
from sae.errors import UserError

CONTEXT = 8
TEXTS = [f"{i}: the fog rolled over the bay and the bridge's towers were gone " * (1 + i % 3) for i in range(120)]


class Harvests:
    """Stands for the host: a position's activation is its document, position, token and sequence; counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, rows):
        self.calls += 1
        tokens, doc, pos = (getattr(rows, name).reshape(-1) for name in ("tokens", "doc", "pos"))
        sequence = torch.arange(len(doc)) // CONTEXT + 4 * self.calls
        acts = torch.stack([doc, pos, tokens, sequence], dim=1).float()
        return Block({"h": acts, "g": 3 * acts}, tokens, doc, pos, rows.mask.reshape(-1))


@pytest.fixture
def make(tokenizer, tmp_path):
    """(texts) → a spool in one folder, as each start of a run makes it, and the harvests it made."""

    def made(texts=TEXTS):
        def rows(state):
            return text.pack(
                itertools.islice(texts, state["documents"] if state else 0, None),
                tokenizer,
                CONTEXT,
                rows_per_batch=4,
                resume=state,
            )

        harvests = Harvests()
        return Spool(tmp_path / "rows", ["h", "g"], 4 * CONTEXT, rows, harvests), harvests

    return made


def batches(spool, capacity=256, position=None, batch=48):
    return windows(spool, batch, capacity, seed=0, position=position)


def same(one, other):
    """All but the number of the sequence, which is that of the call."""
    acts = all(torch.equal(one.acts[hook][:, :3], other.acts[hook][:, :3]) for hook in one.acts)
    return acts and torch.equal(one.rows, other.rows)


def test_every_row_that_counts_comes_once_a_window_and_the_same_of_every_hook(make):
    spool, _ = make()
    slabs, _ = spool.window(256)
    assert slabs == 8
    expected = {tuple(row) for n in range(slabs) for row in spool.block(n).acts["h"].tolist()}
    seen: list = []
    for one in batches(spool):
        assert torch.equal(3 * one.acts["h"], one.acts["g"])
        if one.position["window"]:
            break
        seen += map(tuple, one.acts["h"].tolist())
    assert len(seen) == len(set(seen)) and len(seen) > len(expected) - 48 and set(seen) <= expected
    assert all(row[1] > 0 for row in expected), "the first position of a piece does not count"


@pytest.mark.parametrize("deleted", [False, True])
def test_a_run_that_was_killed_anywhere_reads_the_same_batches_on(make, deleted, tmp_path):
    """Over the end of the text, and without the spool too, if that is lost: then packing and harvesting begin anew."""
    spool, unbroken = make()
    whole = []
    for one in itertools.islice(batches(spool), 120):
        whole.append(one)
        spool.keep_from(one.position["slab"])
    assert spool.n_blocks is not None and whole[-1].position["slab"] > spool.n_blocks, "it went round"
    shutil.rmtree(tmp_path / "rows")
    at, position, harvested = 0, None, 0
    for n in (1, 7, 2, 30, 13, 40, 27):
        spool, harvests = make()
        for one in itertools.islice(batches(spool, position=position), n):
            assert same(one, whole[at])
            at, position = at + 1, one.position
        spool.keep_from(position["slab"])
        harvested += harvests.calls
        if deleted:
            shutil.rmtree(tmp_path / "rows")
    assert at == 120
    if not deleted:
        assert harvested == unbroken.calls, "nothing twice"


def test_what_no_checkpoint_needs_is_dropped(make, tmp_path):
    spool, _ = make()
    for one in itertools.islice(batches(spool), 60):
        spool.keep_from(one.position["slab"])
        there = len(list((tmp_path / "rows").glob("block-*")))
        assert there <= 2 * spool.window(256)[0] + 1


def test_a_text_that_fits_a_window_is_harvested_once_however_often_it_is_read(make):
    spool, harvests = make(TEXTS[:20])
    for one in itertools.islice(batches(spool, capacity=100_000), 100):
        spool.keep_from(one.position["slab"])
    assert harvests.calls == spool.n_blocks and one.position["window"] > 3
    assert spool.window(100_000)[0] == spool.n_blocks


def test_batches_keep_the_promised_number_of_effective_sequences(make):
    wanted, batch = 20, 48
    spool, _ = make([f"{i} " + "fog and bay " * 4 for i in range(600)])
    capacity = buffer_rows(wanted, batch, CONTEXT)
    effective = []
    for one in itertools.islice(batches(spool, capacity, batch=batch), 40):
        shares = torch.unique(one.acts["h"][:, 3], return_counts=True)[1].double() / batch
        effective.append(1 / shares.square().sum().item())
    assert sum(effective) / len(effective) >= wanted


def test_a_text_without_documents_is_refused(make):
    spool, _ = make([])
    with pytest.raises(UserError, match="text.source: holds no text to train on"):
        spool.window(100)


def test_a_damaged_block_is_named(make, tmp_path):
    spool, _ = make()
    spool.block(3)
    path = next((tmp_path / "rows").glob("block-00000003*"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="block-00000003.safetensors: missing or damaged"):
        make()[0].block(3)
    files.write_blocks(path, files.safetensors_blocks({"x": torch.zeros(3)}, {}))
    with pytest.raises(UserError, match="block-00000003.safetensors: not a block of this run"):
        make()[0].block(3)


def test_a_row_is_told_by_its_document_and_place(make):
    spool, _ = make()
    one = next(iter(batches(spool)))
    slab, row = divmod(int(one.rows[5]), spool.slab_rows)
    document, pos = one.acts["h"][5, :2].int().tolist()
    assert spool.told(slab, row) == f"document {document}, token {pos} of its piece"
