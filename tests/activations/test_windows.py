"""Batches from a store: every row once an epoch, exact positions, a mixing guarantee that holds, bounded memory."""

import itertools

import numpy as np
import pytest
import torch

from sae.activations import batches as feed
from sae.activations import shards, windows
from sae.activations.store import Store
from sae.errors import UserError
from tests.activations.planted import HOOK, OTHER, make, text_facts, token_of


def source_of(path, sequences=60, shard_rows=80):
    make(path, sequences, text=text_facts(shard_rows=shard_rows))
    store = Store.open(path)
    return windows.StoreSource(store, store.sources)


@pytest.fixture
def small_slabs(monkeypatch):
    monkeypatch.setattr(shards, "SLAB", 16)  # two sequences


def tokens_of(batch, hook=HOOK):
    return token_of(batch.acts[hook]).tolist()


def test_a_store_that_fits_the_buffer_is_permuted_whole_each_epoch(tmp_path, small_slabs):
    source = source_of(tmp_path / "acts")
    valid = [t for t in range(60 * 8) if t % 8]
    assert source.n == len(valid) == 420 and source.n_slabs == 30
    stream = windows.windows(source, 42, 10_000, seed=0)
    first, second = ([t for b in itertools.islice(stream, 10) for t in tokens_of(b)] for _ in range(2))
    assert sorted(first) == sorted(second) == valid
    assert first != second != valid


def test_every_row_of_a_larger_store_comes_once_an_epoch(tmp_path, small_slabs):
    source = source_of(tmp_path / "acts")
    valid = [t for t in range(480) if t % 8]
    stream = windows.windows(source, 35, 140, seed=0)  # ten slabs a window, three windows an epoch
    for _ in range(3):
        assert sorted(t for b in itertools.islice(stream, 12) for t in tokens_of(b)) == valid
    stream = windows.windows(source, 35, 100, seed=0)  # eight slabs a window: fifteen of them are four epochs
    assert sorted(t for b in itertools.islice(stream, 48) for t in tokens_of(b)) == sorted(4 * valid)


@pytest.mark.parametrize("capacity", [90, 100, 250, 10_000])
def test_resuming_from_any_position_in_a_store_is_exact(tmp_path, small_slabs, capacity):
    source = source_of(tmp_path / "acts", sequences=43)
    whole = list(itertools.islice(windows.windows(source, 50, capacity, seed=3), 20))
    for at in (0, 3, 5, 11):
        rest = windows.windows(source, 50, capacity, seed=3, position=whole[at].position)
        assert [tokens_of(b) for b in itertools.islice(rest, 19 - at)] == [tokens_of(b) for b in whole[at + 1 :]]
    other = next(windows.windows(source, 50, capacity, seed=4))
    assert tokens_of(other) != tokens_of(whole[0])


@pytest.mark.parametrize("wanted", [20, 40])
def test_batches_from_a_store_keep_the_promised_effective_sequences(tmp_path, small_slabs, wanted):
    """Documents are counted: in the planted store a document is a sequence of eight rows, seven of which count."""
    source, batch = source_of(tmp_path / "acts", sequences=1500, shard_rows=800), 64
    capacity = feed.buffer_rows(wanted, batch, 8)
    assert capacity < source.n / 4, "the store is much larger than the buffer"
    effective = []
    for one in itertools.islice(windows.windows(source, batch, capacity, seed=0), 300):
        shares = (token_of(one.acts[HOOK]) // 8).unique(return_counts=True)[1].double() / batch
        effective.append(1 / shares.square().sum().item())
    assert np.mean(effective) >= wanted
    # Batches that span two windows draw on more.
    assert 0.97 < np.mean(effective) / feed.effective_sequences(capacity, batch, 7) < 1.25


@pytest.mark.parametrize("shard_rows", [8, 24, 72, 104])
def test_short_slabs_at_the_ends_of_shards_change_nothing(tmp_path, monkeypatch, shard_rows):
    """Shards that are no multiple of a slab, and windows that span two epochs: all rows, and the promised mixing."""
    monkeypatch.setattr(shards, "SLAB", 64)
    source = source_of(tmp_path / "acts", sequences=205, shard_rows=shard_rows)
    batch, wanted = 32, 20
    capacity = feed.buffer_rows(wanted, batch, 8)
    valid, seen, effective = source.n, [], []
    for one in itertools.islice(windows.windows(source, batch, capacity, seed=0), 8 * valid // batch):
        tokens = token_of(one.acts[HOOK])
        seen.append(tokens)
        shares = (tokens // 8).unique(return_counts=True)[1].double() / batch
        effective.append(1 / shares.square().sum().item())
    assert np.mean(effective) >= wanted
    counts = torch.cat(seen).bincount(minlength=205 * 8)
    assert int(counts[torch.arange(205 * 8) % 8 > 0].min()) >= 7 and int(counts.max()) <= 9


def test_rows_that_do_not_count_take_no_memory(tmp_path, small_slabs, monkeypatch):
    source = source_of(tmp_path / "acts", sequences=600, shard_rows=800)
    real = source.store.read

    def masked(sources, slab, memory):
        block = real(sources, slab, memory)
        block.mask.logical_and_(block.pos == 3)
        return block

    monkeypatch.setattr(source.store, "read", masked)
    source.__dict__["n"] = 600
    made = []
    buffer = windows._Buffer
    monkeypatch.setattr(windows, "_Buffer", lambda *args: made.append(buffer(*args)) or made[-1])
    used = set()
    stream = windows.windows(source, 10, 40, seed=0)
    for _ in range(100):
        next(stream)
        used |= set(range(made[0].slots)) - set(torch.cat(made[0].empty).tolist())
    assert len(used) <= 3 * 40 < made[0].slots


def test_the_buffer_is_one_allocation_of_the_promised_size(tmp_path, small_slabs, monkeypatch):
    source = source_of(tmp_path / "acts", sequences=600, shard_rows=800)
    made = []
    real = windows._Buffer

    def noted(*arguments):
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(windows, "_Buffer", noted)
    stream = windows.windows(source, 35, 100, seed=0)
    next(stream)
    where = made[0].acts[HOOK].data_ptr()
    for _ in itertools.islice(stream, 200):
        pass
    assert len(made) == 1 and made[0].acts[HOOK].data_ptr() == where
    assert made[0].acts[HOOK].shape == (128, 16)  # 100 rows that count are in eight slabs of sixteen rows


def test_batches_of_several_sources_of_a_store_hold_the_same_rows(tmp_path, small_slabs):
    make(tmp_path / "acts", 60)
    store = make(tmp_path / "acts", 60, hooks=(OTHER,), width=24, host="other", host_fingerprint="beef")
    source = windows.StoreSource(store, store.sources)
    assert source.n == 420
    for one in itertools.islice(windows.windows(source, 35, 100, seed=0), 30):
        assert tokens_of(one, HOOK) == tokens_of(one, OTHER)
    sample = source.sample(50, seed=1)
    assert torch.equal(token_of(sample[HOOK]), token_of(sample[OTHER])) and len(sample[HOOK]) == 50
    assert torch.equal(source.sample(50, seed=1)[HOOK], sample[HOOK])


def test_a_damaged_slab_stops_the_batches_with_its_file(tmp_path, small_slabs):
    source = source_of(tmp_path / "acts")
    path = tmp_path / "acts" / "shard-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="shard-00003.safetensors: .* is not what was written, in rows"):
        list(itertools.islice(windows.windows(source, 35, 100, seed=0), 30))


def test_a_position_of_an_earlier_version_is_refused(tmp_path, small_slabs):
    with pytest.raises(UserError, match="began with an earlier version"):
        next(windows.windows(source_of(tmp_path / "acts"), 35, 100, seed=0, position={"epoch": 1, "offset": 3}))
